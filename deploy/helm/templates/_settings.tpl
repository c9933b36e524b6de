{{/* Settings of a component as the data of a ConfigMap: what the chart decides, over what values say. */}}

{{- define "asap.blobSettings" -}}
{{- with .Values.blobs.url }}
ASAP_BLOBS__URL: {{ . | quote }}
{{- end }}
{{- with .Values.blobs.endpointUrl }}
ASAP_BLOBS__ENDPOINT_URL: {{ . | quote }}
{{- end }}
{{- with .Values.blobs.region }}
ASAP_BLOBS__REGION: {{ . | quote }}
{{- end }}
{{- end }}

{{/* Address of a served model. (list root name) */}}
{{- define "asap.servedUrl" -}}
http://{{ include "asap.fullname" (index . 0) }}-serving-{{ index . 1 }}:8000
{{- end }}

{{/* (list root component) */}}
{{- define "asap.settings" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $values := merge (deepCopy ($component.config | default dict)) $root.Values.config -}}
{{- range $name, $value := $values }}
{{ $name }}: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
ASAP_HOME: /var/lib/asap
{{- if not (hasKey $values "ASAP_TELEMETRY__LOG_JSON") }}
ASAP_TELEMETRY__LOG_JSON: "true"
{{- end }}
{{- if eq $component.name "gateway" }}
ASAP_GATEWAY__HOST: 0.0.0.0
ASAP_GATEWAY__PORT: "8000"
{{- if and $root.Values.serving.models (not (hasKey $values "ASAP_SERVING__ENDPOINTS")) }}
{{- $endpoints := dict }}
{{- range $name, $model := $root.Values.serving.models }}
{{- $_ := set $endpoints (default $name $model.servedName) (list (include "asap.servedUrl" (list $root $name))) }}
{{- end }}
ASAP_SERVING__ENDPOINTS: {{ toJson $endpoints | quote }}
{{- end }}
{{- else }}
ASAP_TELEMETRY__ADMIN_HOST: 0.0.0.0
ASAP_TELEMETRY__ADMIN_PORT: "9100"
{{- end }}
{{- if has $component.name (list "gateway" "trainer" "generate" "grade") }}
{{ include "asap.blobSettings" $root | trim }}
{{- end }}
{{- if and (eq $component.name "surprisal") $component.weights.source }}
ASAP_SURPRISAL__MODEL: {{ include "asap.weightsFolder" $component.weights }}
{{- end }}
{{- if and (eq $component.name "generate") (eq (len $root.Values.serving.models) 1) (not (hasKey $values "ASAP_EVALUATOR__BASE_URL")) }}
ASAP_EVALUATOR__BASE_URL: {{ include "asap.servedUrl" (list $root (keys $root.Values.serving.models | first)) }}/v1
{{- end }}
{{- if eq $component.name "grade" }}
ASAP_EVALUATOR__SANDBOX_MIN_LEVEL: {{ eq $root.Values.grading.level "namespaces" | ternary "namespaces" "landlock" }}
{{- end }}
{{- if eq $component.name "trainer" }}
{{ include "asap.trainerSettings" $root | trim }}
{{- end }}
{{- end }}

{{- define "asap.trainerSettings" -}}
ASAP_TRAINER__LAUNCHER: kubernetes
ASAP_TRAINER__KUBERNETES__NAMESPACE: {{ .Release.Namespace }}
ASAP_TRAINER__KUBERNETES__INSTANCE: {{ .Release.Name }}
ASAP_TRAINER__KUBERNETES__IMAGE: {{ include "asap.image" (list . "train") }}
ASAP_TRAINER__KUBERNETES__SERVICE_ACCOUNT: {{ include "asap.fullname" . }}
{{- if .Values.priority.create }}
ASAP_TRAINER__KUBERNETES__PRIORITY_CLASS: {{ .Release.Namespace }}-{{ include "asap.fullname" . }}-batch
{{- end }}
{{- with include "asap.modelClaim" . }}
ASAP_TRAINER__KUBERNETES__MODEL_CACHE_CLAIM: {{ . }}
{{- end }}
{{- with .Values.secrets.blobs.name }}
ASAP_TRAINER__KUBERNETES__ENV_SECRETS: {{ list . | toJson | quote }}
{{- end }}
{{- with .Values.image.pullSecrets }}
ASAP_TRAINER__KUBERNETES__IMAGE_PULL_SECRETS: {{ toJson . | quote }}
{{- end }}
{{- end }}
