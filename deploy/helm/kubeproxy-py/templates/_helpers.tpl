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

{{/*
Address and port of e.g. 0.0.0.0:10256, [fd00::1]:10256 or fd00::1, as a map with host and port: the host
is "" where it stands for all addresses. Arguments: the text, the port if it has none.
*/}}
{{- define "kubeproxy-py.address" -}}
{{- $text := default "" (index . 0) }}
{{- $host := $text }}
{{- $port := index . 1 }}
{{- if or (hasPrefix "[" $text) (eq (len (splitList ":" $text)) 2) }}
{{- $port = default $port (regexFind ":[0-9]+$" $text | trimPrefix ":") }}
{{- $host = regexReplaceAll ":[0-9]*$" $text "" | trimAll "[]" }}
{{- end }}
{{- if has $host (list "0.0.0.0" "::") }}
{{- $host = "" }}
{{- end }}
{{- dict "host" $host "port" ($port | toString) | toYaml }}
{{- end }}

{{- define "kubeproxy-py.probe" -}}
httpGet:
  path: {{ .path }}
  port: healthz
  {{- with .host }}
  host: {{ . | quote }}
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
