{{- define "probelet.selector" -}}
app.kubernetes.io/name: probelet
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "probelet.labels" -}}
{{ include "probelet.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "probelet.securityContext" -}}
runAsUser: 0
runAsGroup: 0
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
# The runtime's profile keeps from looking at processes of the host: the kubelet and the runtime.
appArmorProfile:
  type: Unconfined
seccompProfile:
  type: RuntimeDefault
{{- with .Values.seLinuxOptions }}
seLinuxOptions: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "probelet.image" -}}
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{- define "probelet.mounts" -}}
- name: cni-net
  mountPath: {{ .Values.cni.netDir }}
- name: state
  mountPath: {{ .Values.stateDir }}
- name: bpffs
  mountPath: {{ .Values.bpffs }}
  mountPropagation: HostToContainer
{{- end }}

{{- define "probelet.dirs" -}}
- --cni-net-dir={{ .Values.cni.netDir }}
- --cni-bin-dir={{ .Values.cni.binDir }}
- --bpf-dir={{ .Values.bpffs }}/probelet
- --state-dir={{ .Values.stateDir }}
{{- end }}

{{/* The annotations of what "helm uninstall" makes after it has deleted the rest, in the order of their weights. */}}
{{- define "probelet.hook" -}}
helm.sh/hook: post-delete
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
