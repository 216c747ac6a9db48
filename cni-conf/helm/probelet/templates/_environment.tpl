{{- /*
The flags of "probeletd run" as environment variables. They are part of the pod template rather than of a ConfigMap: while a kubelet
cannot reach the API server, and for half a minute afterwards, it starts pods with the ConfigMap that it read last.
*/ -}}
{{- define "probelet.environment" -}}
- name: PROBELET_MODE
  value: {{ .Values.mode | quote }}
- name: PROBELET_SOURCE
  value: {{ .Values.source | quote }}
- name: PROBELET_CHAIN
  value: {{ .Values.cni.chain | quote }}
- name: PROBELET_HOOK
  value: {{ .Values.hook | quote }}
- name: PROBELET_CNI_NET_DIR
  value: {{ include "probelet.netDir" . | quote }}
- name: PROBELET_CNI_BIN_DIR
  value: {{ include "probelet.binDir" . | quote }}
- name: PROBELET_STATE_DIR
  value: {{ .Values.stateDir | quote }}
- name: PROBELET_BPF_DIR
  value: {{ printf "%s/probelet" .Values.bpffs | quote }}
{{- if eq .Values.source "kubelet" }}
- name: PROBELET_KUBELET_PODS_SOCKET
  value: {{ printf "%s/pods-api/pods-api.sock" .Values.kubeletDir | quote }}
{{- end }}
- name: PROBELET_METRICS_LISTEN
  value: {{ .Values.metrics.listen | quote }}
{{- range $name, $value := .Values.config }}
- name: PROBELET_{{ $name | upper | replace "-" "_" }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}
