{{/* The specification of the pods that run on each node, or, with .Values.uninstall, of those that take probelet off it. */}}
{{- define "probelet.pod" -}}
{{- $listen := .Values.metrics.listen }}
{{- $port := $listen | splitList ":" | last }}
{{- $host := $listen | trimSuffix (printf ":%s" $port) | trimPrefix "[" | trimSuffix "]" }}
{{- $local := or (hasPrefix "127." $host) (eq $host "::1") (eq $host "localhost") }}
{{- if .Values.uninstall }}
automountServiceAccountToken: false
{{- else }}
serviceAccountName: {{ .Release.Name }}
{{- end }}
# The host-side veths are in the host's network namespace, and the kubelet is one of the host's processes.
hostNetwork: true
hostPID: true
dnsPolicy: Default
enableServiceLinks: false
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
terminationGracePeriodSeconds: 10
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
initContainers:
  {{- if .Values.uninstall }}
  - name: uninstall
    {{- include "probelet.image" . | nindent 4 }}
    args:
      - uninstall
      - --wait-for-daemon=5m
      {{- include "probelet.dirs" . | nindent 6 }}
    resources: {{- toYaml .Values.resources | nindent 6 }}
    securityContext:
      {{- include "probelet.securityContext" . | nindent 6 }}
      capabilities:
        drop: [ALL]
        add:
          # To open maps and programs, and to detach these from devices.
          - BPF
          - NET_ADMIN
          # The directories of the CNI may be another user's (Kubespray's are kube's), and writable by that one only.
          - DAC_OVERRIDE
          # To see CNI plugins at work, and the host's records of pods that CRI-O will delete.
          - SYS_PTRACE
  {{- else }}
  - name: install
    {{- include "probelet.image" . | nindent 4 }}
    args:
      - install
      - --chain={{ .Values.cni.chain }}
      - --hook={{ .Values.hook }}
      {{- include "probelet.dirs" . | nindent 6 }}
    resources: {{- toYaml .Values.resources | nindent 6 }}
    securityContext:
      {{- include "probelet.securityContext" . | nindent 6 }}
      capabilities:
        drop: [ALL]
        add:
          # The directories of the CNI may be another user's (Kubespray's are kube's), and writable by that one only.
          - DAC_OVERRIDE
          # To give a copy of a network's configuration the owner of its original.
          - CHOWN
          # To read from the runtime's program which libcni it has, and from its configuration where it looks for plugins.
          - SYS_PTRACE
  {{- end }}
    volumeMounts:
      {{- include "probelet.mounts" . | nindent 6 }}
      - name: cni-bin
        mountPath: {{ include "probelet.binDir" . }}
containers:
  {{- if .Values.uninstall }}
  # The work is done; a complete rollout says that it is on all nodes.
  - name: uninstalled
    {{- include "probelet.image" . | nindent 4 }}
    args: [wait]
    resources: {{- toYaml .Values.resources | nindent 6 }}
    securityContext:
      {{- include "probelet.securityContext" . | nindent 6 }}
      capabilities:
        drop: [ALL]
  {{- else }}
  - name: probeletd
    {{- include "probelet.image" . | nindent 4 }}
    args: [run]
    env:
      {{- include "probelet.environment" . | nindent 6 }}
      - name: NODE_NAME
        valueFrom:
          fieldRef:
            fieldPath: spec.nodeName
      - name: NODE_IP
        valueFrom:
          fieldRef:
            fieldPath: status.hostIP
    {{- if not $local }}
    ports:
      # They are the node's: the pod has no network of its own.
      - name: metrics
        containerPort: {{ $port }}
        hostPort: {{ $port }}
    {{- end }}
    livenessProbe:
      httpGet:
        path: /healthz
        port: {{ $port }}
        {{- if $local }}
        host: {{ $host | quote }}
        {{- end }}
      periodSeconds: 10
      timeoutSeconds: 5
    # Not ready: probes cannot be answered, though all else is well. So a rollout stops before all nodes are like that.
    readinessProbe:
      httpGet:
        path: /readyz
        port: {{ $port }}
        {{- if $local }}
        host: {{ $host | quote }}
        {{- end }}
      periodSeconds: 5
      timeoutSeconds: 5
    resources: {{- toYaml .Values.resources | nindent 6 }}
    securityContext:
      {{- include "probelet.securityContext" . | nindent 6 }}
      capabilities:
        drop: [ALL]
        add:
          # Programs and maps; attaching them to devices; the trace point of listening sockets.
          - BPF
          - NET_ADMIN
          - PERFMON
          # To keep the chain as it is where the directory is another user's, as with install.
          - DAC_OVERRIDE
          - CHOWN
          # To find the kubelet, and what the runtime has recorded of pods that run already.
          - SYS_PTRACE
    volumeMounts:
      {{- include "probelet.mounts" . | nindent 6 }}
      # To see that the runtime finds the plugin.
      - name: cni-bin
        mountPath: {{ include "probelet.binDir" . }}
        readOnly: true
      - name: cgroup
        mountPath: /host/cgroup
        readOnly: true
        mountPropagation: HostToContainer
      {{- if eq .Values.source "kubelet" }}
      # The directory, because each kubelet recreates the socket.
      - name: pods-api
        mountPath: {{ .Values.kubeletDir }}/pods-api
        readOnly: true
      {{- end }}
  {{- end }}
volumes:
  - name: cni-net
    hostPath:
      path: {{ include "probelet.netDir" . }}
      type: Directory
  - name: cni-bin
    hostPath:
      path: {{ include "probelet.binDir" . }}
      type: Directory
  - name: state
    hostPath:
      path: {{ .Values.stateDir }}
      type: DirectoryOrCreate
  - name: bpffs
    hostPath:
      path: {{ .Values.bpffs }}
      type: Directory
  {{- if not .Values.uninstall }}
  - name: cgroup
    hostPath:
      path: /sys/fs/cgroup
      type: Directory
  {{- if eq .Values.source "kubelet" }}
  - name: pods-api
    hostPath:
      path: {{ .Values.kubeletDir }}/pods-api
      type: DirectoryOrCreate
  {{- end }}
  {{- end }}
{{- end }}
