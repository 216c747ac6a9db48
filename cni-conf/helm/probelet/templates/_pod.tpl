{{/* Spec of the pods that run probelet on each node or, with .Values.uninstall, remove it. */}}
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
# The host-side veths are in the host's network namespace, and the kubelet is a process of the host.
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
          # To open maps and programs, and to detach programs from devices.
          - BPF
          - NET_ADMIN
          # The CNI directories may belong to another user and be writable by that user only (kube with Kubespray).
          - DAC_OVERRIDE
          # To find the runtime's configuration, running CNI plugins, and the host's records of pods that CRI-O will delete.
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
          # The CNI directories may belong to another user and be writable by that user only (kube with Kubespray).
          - DAC_OVERRIDE
          # To give the copy of a network configuration the owner of its original.
          - CHOWN
          # To read the libcni version from the runtime's binary, and the plugin directory from its configuration.
          - SYS_PTRACE
  {{- end }}
    volumeMounts:
      {{- include "probelet.mounts" . | nindent 6 }}
      - name: cni-bin
        mountPath: {{ include "probelet.binDir" . }}
containers:
  {{- if .Values.uninstall }}
  # Keeps the pod running once the work is done: a complete rollout shows that all nodes are done.
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
      # A port of the node: the pod uses the host network.
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
    # The pod is ready only if probes can be answered, so that a rollout stops before it breaks all nodes.
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
          # To load programs and maps, attach programs to devices, and attach to the tracepoint of listening sockets.
          - BPF
          - NET_ADMIN
          - PERFMON
          # To update the chain in a directory of another user, as in install.
          - DAC_OVERRIDE
          - CHOWN
          # To find the kubelet, and the runtime's records of running pods.
          - SYS_PTRACE
    volumeMounts:
      {{- include "probelet.mounts" . | nindent 6 }}
      # To check that the runtime finds the plugin.
      - name: cni-bin
        mountPath: {{ include "probelet.binDir" . }}
        readOnly: true
      - name: cgroup
        mountPath: /host/cgroup
        readOnly: true
        mountPropagation: HostToContainer
      {{- if eq .Values.source "kubelet" }}
      # The directory rather than the socket, which the kubelet recreates when it starts.
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
