{{- define "kubeproxy-py.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "kubeproxy-py.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "kubeproxy-py.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "kubeproxy-py.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "kubeproxy-py.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kubeproxy-py.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "kubeproxy-py.labels" -}}
{{ include "kubeproxy-py.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "kubeproxy-py.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "kubeproxy-py.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name is needed where serviceAccount.create is false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "kubeproxy-py.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) }}
{{- end }}
{{- end }}

{{/* Who asks for a monitor wants the metrics to be reachable, which by default they are not. */}}
{{- define "kubeproxy-py.config" -}}
{{- $head := dict "apiVersion" "kubeproxy.config.k8s.io/v1alpha1" "kind" "KubeProxyConfiguration" }}
{{- if or .Values.podMonitor.enabled .Values.serviceMonitor.enabled }}
{{- $_ := set $head "metricsBindAddress" "0.0.0.0:10249" }}
{{- end }}
{{- toYaml (mergeOverwrite $head (deepCopy .Values.config)) }}
{{- end }}

{{/* The port of an address such as 0.0.0.0:10256 or [::]:10256. Arguments: address, default. */}}
{{- define "kubeproxy-py.port" -}}
{{- $port := regexFind ":[0-9]+$" (default "" (index . 0)) | trimPrefix ":" }}
{{- if or (not $port) (and (not (contains "]" (index . 0))) (gt (len (splitList ":" (index . 0))) 2)) }}
{{- index . 1 }}
{{- else }}
{{- $port }}
{{- end }}
{{- end }}

{{- define "kubeproxy-py.env" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- if .Values.apiServer.host }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ .Values.apiServer.host | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ .Values.apiServer.port | quote }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}
