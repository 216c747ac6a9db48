{{- define "probelet.selector" -}}
app.kubernetes.io/name: probelet
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "probelet.metricsLabels" -}}
app.kubernetes.io/name: probelet-metrics
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
# The runtime's profile denies access to processes of the host, such as the kubelet and the runtime.
appArmorProfile:
  type: Unconfined
seccompProfile:
  type: RuntimeDefault
{{- with .Values.seLinuxOptions | default (include "probelet.platform" . | fromYaml).seLinuxOptions }}
seLinuxOptions: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Values of the platform. */}}
{{- define "probelet.platform" -}}
{{- with .Values.platform }}{{ get ($.Files.Get "platforms.yaml" | fromYaml) . | toYaml }}{{ end }}
{{- end }}

{{- define "probelet.netDir" -}}
{{ .Values.cni.netDir | default (include "probelet.platform" . | fromYaml).netDir | default "/etc/cni/net.d" }}
{{- end }}

{{- define "probelet.binDir" -}}
{{ .Values.cni.binDir | default (include "probelet.platform" . | fromYaml).binDir | default "/opt/cni/bin" }}
{{- end }}

{{- define "probelet.image" -}}
image: "{{ required "image.repository: must be set to where your nodes pull from. To change one value of a release and keep the others: helm upgrade --reset-then-reuse-values" .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{- define "probelet.mounts" -}}
- name: cni-net
  mountPath: {{ include "probelet.netDir" . }}
- name: state
  mountPath: {{ .Values.stateDir }}
- name: bpffs
  mountPath: {{ .Values.bpffs }}
  mountPropagation: HostToContainer
{{- end }}

{{- define "probelet.dirs" -}}
- --cni-net-dir={{ include "probelet.netDir" . }}
- --cni-bin-dir={{ include "probelet.binDir" . }}
- --bpf-dir={{ .Values.bpffs }}/probelet
- --state-dir={{ .Values.stateDir }}
{{- end }}

{{/* Annotations of the objects that "helm uninstall" creates after it has deleted the others, in order of their weights. */}}
{{- define "probelet.hook" -}}
helm.sh/hook: post-delete
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
