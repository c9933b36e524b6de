{{/* Names, labels, images and the parts that all pods share. */}}

{{- define "asap.fullname" -}}
{{- $default := ternary .Release.Name (printf "%s-asap" .Release.Name) (contains "asap" .Release.Name) -}}
{{- default $default .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Selectors; training Jobs carry the same three, so the name is always `asap`. (list root component) */}}
{{- define "asap.selector" -}}
app.kubernetes.io/name: asap
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "asap.labels" -}}
{{ include "asap.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}
{{- end }}

{{- define "asap.metadata" -}}
name: {{ include "asap.fullname" (index . 0) }}-{{ index . 2 }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  {{- include "asap.labels" . | nindent 2 }}
{{- end }}

{{/* What each component is given and may reach: the one table behind environments and policies. */}}
{{- define "asap.roles" -}}
gateway: {secrets: [database, queue, pepper, webhooks, blobs, otlp], egress: [database, queue, blobs, serving, webhooks, otlp]}
anchor: {secrets: [database, queue, llm, otlp], egress: [database, queue, llm, otlp]}
surprisal: {secrets: [database, queue, scorer, otlp], egress: [database, queue, otlp]}
trainer: {secrets: [database, queue, blobs, otlp], egress: [database, queue, blobs, apiServer, otlp]}
generate: {secrets: [database, queue, blobs, otlp], egress: [database, queue, blobs, serving, otlp]}
grade: {secrets: [database, queue, gradeBlobs], egress: [database, queue, blobs]}
migrate: {secrets: [database, pepper], egress: [database]}
{{- end }}

{{/* A component's values over the defaults, with its name. (list root name own) */}}
{{- define "asap.component" -}}
{{- $merged := mergeOverwrite (deepCopy (index . 0).Values.defaults) (deepCopy (index . 2)) -}}
{{- toYaml (set $merged "name" (index . 1)) -}}
{{- end }}

{{/* Gateway and enabled workers by name, merged. */}}
{{- define "asap.components" -}}
gateway:
  {{- include "asap.component" (list . "gateway" .Values.gateway) | nindent 2 }}
{{- range $name, $own := .Values.workers }}
{{- if $own.enabled }}
{{ $name }}:
  {{- include "asap.component" (list $ $name $own) | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{/* (list root key of images) */}}
{{- define "asap.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.images (index . 1) -}}
{{- $registry := $root.Values.image.registry | trimSuffix "/" -}}
{{- $name := ternary (printf "%s/%s" $registry $image.repository) $image.repository (ne $registry "") -}}
{{- if $image.digest -}}
{{ $name }}@{{ $image.digest }}
{{- else -}}
{{ $name }}:{{ coalesce $image.tag $root.Values.image.tag $root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* Secret and entry of a secret of `secrets`: named, or generated. (list root id) gives NAME/KEY or nothing. */}}
{{- define "asap.secret" -}}
{{- $root := index . 0 -}}
{{- $id := index . 1 -}}
{{- $secret := index $root.Values.secrets $id -}}
{{- $builtin := dict "database" $root.Values.builtin.postgres.enabled "queue" $root.Values.builtin.redis.enabled -}}
{{- $made := and $root.Values.secrets.generate (has $id (list "pepper" "firstKey")) -}}
{{- if index $builtin $id -}}
{{ include "asap.fullname" $root }}-generated/{{ $id }}
{{- else if $secret.name -}}
{{ $secret.name }}/{{ $secret.key }}
{{- else if $made -}}
{{ include "asap.fullname" $root }}-generated/{{ $id }}
{{- end -}}
{{- end }}

{{/* One variable from a Secret. (list root id VARIABLE) */}}
{{- define "asap.secretVariable" -}}
{{- with include "asap.secret" (list (index . 0) (index . 1)) }}
- name: {{ index $ 2 }}
  valueFrom:
    secretKeyRef:
      name: {{ (splitList "/" .) | first }}
      key: {{ (splitList "/" .) | last }}
{{- end }}
{{- end }}

{{/* The secrets of a role as variables. (list root ids) */}}
{{- define "asap.secretVariables" -}}
{{- $root := index . 0 -}}
{{- $variables := dict "database" "ASAP_DATABASE__URL" "queue" "ASAP_QUEUE__URL" "pepper" "ASAP_AUTH__PEPPER" "llm" "ASAP_LLM__API_KEY" "scorer" "ASAP_SURPRISAL__API_KEY" "webhooks" "ASAP_WEBHOOKS__SECRET" "otlp" "ASAP_TELEMETRY__OTLP_ENDPOINT" -}}
{{- range $id := index . 1 }}
{{- if has $id (list "blobs" "gradeBlobs") }}
{{- $name := $root.Values.secrets.blobs.name }}
{{- if eq $id "gradeBlobs" }}
{{- $name = default $name $root.Values.grading.blobsSecret }}
{{- end }}
{{- if $name }}
{{- range $variable := list "ASAP_BLOBS__ACCESS_KEY" "ASAP_BLOBS__SECRET_KEY" }}
- name: {{ $variable }}
  valueFrom:
    secretKeyRef:
      name: {{ $name }}
      key: {{ $variable }}
{{- end }}
{{- end }}
{{- else }}
{{- include "asap.secretVariable" (list $root $id (index $variables $id)) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "asap.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "asap.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What every pod says of itself. (list root component priority) */}}
{{- define "asap.pod" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $class := $component.priorityClassName -}}
{{- if and (not $class) $root.Values.priority.create -}}
{{- $class = printf "%s-%s-%s" $root.Release.Namespace (include "asap.fullname" $root) (index . 2) -}}
{{- end -}}
serviceAccountName: {{ include "asap.fullname" $root }}{{ eq $component.name "trainer" | ternary "-trainer" "" }}
automountServiceAccountToken: {{ eq $component.name "trainer" }}
enableServiceLinks: false
shareProcessNamespace: false
terminationGracePeriodSeconds: {{ $component.terminationGracePeriodSeconds }}
securityContext:
  {{- include "asap.podSecurity" $root | nindent 2 }}
{{- with $class }}
priorityClassName: {{ . }}
{{- end }}
{{- with $component.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $component $key }}
{{ $key }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "asap.selector" (list $root $component.name) | nindent 8 }}
  {{- end }}
{{- end }}

{{/* Labels and annotations of a component's pods; they restart when their settings change. (list root component) */}}
{{- define "asap.podMetadata" -}}
{{- $component := index . 1 -}}
labels:
  {{- include "asap.labels" (list (index . 0) $component.name) | nindent 2 }}
  {{- range $key, $value := $component.podLabels }}
  {{ $key }}: {{ $value | quote }}
  {{- end }}
annotations:
  checksum/config: {{ include "asap.settings" . | sha256sum }}
  {{- range $key, $value := $component.podAnnotations }}
  {{ $key }}: {{ $value | quote }}
  {{- end }}
{{- end }}

{{- define "asap.resources" -}}
{{- $component := . -}}
{{- $resources := deepCopy $component.resources -}}
{{- if $component.gpu.count -}}
{{- $_ := set $resources.limits $component.gpu.resource ($component.gpu.count | toString) -}}
{{- end -}}
{{ toYaml $resources }}
{{- end }}

{{/* The claim for weights, if there is one. */}}
{{- define "asap.modelClaim" -}}
{{- if .Values.modelCache.existingClaim -}}
{{ .Values.modelCache.existingClaim }}
{{- else if .Values.modelCache.create -}}
{{ include "asap.fullname" . }}-models
{{- end -}}
{{- end }}

{{/* Folder of a fetched model: of the same source, revision and hash it is the same. */}}
{{- define "asap.weightsFolder" -}}
/models/{{ .source | replace "://" "-" | replace "/" "-" | replace "." "-" | lower | trunc 48 }}-{{ printf "%s %s %s" .source .revision .sha256 | sha256sum | trunc 12 }}
{{- end }}

{{/* Writable folders; all else is read-only. (list root component) */}}
{{- define "asap.volumes" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
- name: home
  emptyDir: {sizeLimit: {{ $component.tmpSize }}}
- name: tmp
  emptyDir: {sizeLimit: {{ $component.tmpSize }}}
{{- if $component.shmSize }}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ $component.shmSize }}}
{{- end }}
{{- if or $component.weights.source $component.path }}
- name: models
  persistentVolumeClaim: {claimName: {{ include "asap.modelClaim" $root }}}
{{- end }}
{{- with $component.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "asap.mounts" -}}
- {name: home, mountPath: /var/lib/asap}
- {name: tmp, mountPath: /tmp}
{{- if .shmSize }}
- {name: shm, mountPath: /dev/shm}
{{- end }}
{{- if or .weights.source .path }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- with .extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What all our processes are told besides their settings. */}}
{{- define "asap.processVariables" -}}
- {name: HOME, value: /var/lib/asap}
- {name: TMPDIR, value: /tmp}
- {name: USER, value: asap}
{{- end }}

{{/* Waits until the migration has run. (list root component) */}}
{{- define "asap.waitContainer" -}}
{{- $root := index . 0 -}}
- name: wait
  image: {{ include "asap.image" (list $root "light") }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args: [db, wait]
  envFrom:
    - configMapRef: {name: {{ include "asap.fullname" $root }}-{{ (index . 1).name }}}
  env:
    {{- include "asap.processVariables" $root | nindent 4 }}
    {{- include "asap.secretVariables" (list $root (list "database")) | nindent 4 }}
  securityContext:
    {{- include "asap.containerSecurity" $root | nindent 4 }}
  resources:
    {{- toYaml $root.Values.initResources | nindent 4 }}
  volumeMounts:
    - {name: home, mountPath: /var/lib/asap}
    - {name: tmp, mountPath: /tmp}
{{- end }}

{{/* Fetches weights, or finds them in the cache, and checks their hash. (list root component) */}}
{{- define "asap.weightsContainer" -}}
{{- $root := index . 0 -}}
{{- $weights := (index . 1).weights -}}
- name: weights
  image: {{ include "asap.image" (list $root "light") }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  args:
    - models
    - fetch
    - {{ $weights.source | quote }}
    {{- with $weights.revision }}
    - --revision={{ . }}
    {{- end }}
    {{- with $weights.sha256 }}
    - --sha256={{ . }}
    {{- end }}
    - --out={{ include "asap.weightsFolder" $weights }}
  env:
    {{- include "asap.processVariables" $root | nindent 4 }}
    - {name: HF_HOME, value: /models/.huggingface}
    {{- if hasPrefix "s3://" $weights.source }}
    {{- range $name, $value := include "asap.blobSettings" $root | fromYaml }}
    - {name: {{ $name }}, value: {{ $value | quote }}}
    {{- end }}
    {{- include "asap.secretVariables" (list $root (list "blobs")) | nindent 4 }}
    {{- end }}
  securityContext:
    {{- include "asap.containerSecurity" $root | nindent 4 }}
  resources:
    {{- toYaml $root.Values.initResources | nindent 4 }}
  volumeMounts:
    - {name: home, mountPath: /var/lib/asap}
    - {name: tmp, mountPath: /tmp}
    - {name: models, mountPath: /models}
{{- end }}

{{/* (path port period failures) of a probe over HTTP. */}}
{{- define "asap.probe" -}}
httpGet: {path: {{ index . 0 }}, port: {{ index . 1 }}}
periodSeconds: {{ index . 2 }}
timeoutSeconds: 5
failureThreshold: {{ index . 3 }}
{{- end }}

{{/* startup, liveness and readiness. (list component port livePath readyPath) */}}
{{- define "asap.probes" -}}
startupProbe:
  {{- include "asap.probe" (list (index . 2) (index . 1) 5 (div (add (index . 0).startupSeconds 4) 5)) | nindent 2 }}
livenessProbe:
  {{- include "asap.probe" (list (index . 2) (index . 1) 10 6) | nindent 2 }}
readinessProbe:
  {{- include "asap.probe" (list (index . 3) (index . 1) 10 3) | nindent 2 }}
{{- end }}

{{/* Disruption budget, for more than one pod. (list root component) */}}
{{- define "asap.disruption" -}}
{{- $component := index . 1 -}}
{{- $most := eq $component.autoscaling.kind "none" | ternary $component.replicas $component.autoscaling.max | int -}}
{{- if gt $most 1 }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "asap.metadata" (list (index . 0) $component.name $component.name) | nindent 2 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      {{- include "asap.selector" (list (index . 0) $component.name) | nindent 6 }}
{{- end }}
{{- end }}
