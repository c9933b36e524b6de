{{/* What no schema can say. Each message begins with the path of the value that is wrong. */}}
{{- define "asap.check" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}
{{- if not (or $v.secrets.database.name $v.builtin.postgres.enabled) -}}
{{- $wrong = append $wrong "secrets.database.name: name the Secret with the database's URL, or set builtin.postgres.enabled" -}}
{{- end -}}
{{- if not (or $v.secrets.queue.name $v.builtin.redis.enabled) -}}
{{- $wrong = append $wrong "secrets.queue.name: name the Secret with the broker's URL, or set builtin.redis.enabled" -}}
{{- end -}}
{{- if not (or $v.secrets.pepper.name $v.secrets.generate) -}}
{{- $wrong = append $wrong "secrets.pepper.name: name the Secret with the pepper of API keys, or set secrets.generate" -}}
{{- end -}}
{{- if and (or (gt (int $v.gateway.replicas) 1) (ne (dig "autoscaling" "kind" $v.defaults.autoscaling.kind $v.gateway) "none")) (not $v.blobs.url) -}}
{{- $wrong = append $wrong "blobs.url: more than one gateway needs a store that all of them reach, s3://BUCKET/PREFIX" -}}
{{- end -}}
{{- if and $v.workers.trainer.enabled (not $v.blobs.url) -}}
{{- $wrong = append $wrong "blobs.url: the trainer needs s3://BUCKET/PREFIX, because pods share no disk" -}}
{{- end -}}
{{- if and $v.modelCache.create $v.modelCache.existingClaim -}}
{{- $wrong = append $wrong "modelCache.create: one of it and modelCache.existingClaim" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.host) -}}
{{- $wrong = append $wrong "ingress.host: an Ingress needs a host name" -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- $wrong = append $wrong "httpRoute.parentRefs: a route needs a gateway" -}}
{{- end -}}
{{- if and $v.secrets.scorer.name (ne (get (merge (deepCopy (dig "config" dict $v.workers.surprisal)) $v.config) "ASAP_SURPRISAL__BACKEND") "vllm") -}}
{{- $wrong = append $wrong "secrets.scorer.name: a key for ASAP_SURPRISAL__BACKEND vllm, and that is not set" -}}
{{- end -}}
{{- $wrong = concat $wrong (include "asap.checkGrading" . | fromYamlArray) -}}
{{- $wrong = concat $wrong (include "asap.checkNetwork" . | fromYamlArray) -}}
{{- $wrong = concat $wrong (include "asap.checkComponents" . | fromYamlArray) -}}
{{- if $v.production -}}
{{- $wrong = concat $wrong (include "asap.checkProduction" . | fromYamlArray) -}}
{{- end -}}
{{- if $wrong -}}
{{- fail (printf "\n%s" (join "\n" $wrong)) -}}
{{- end -}}
{{- end }}

{{- define "asap.checkGrading" -}}
{{- range $name := list "generate" "grade" }}
{{- if and (index $.Values.workers $name).enabled (not $.Values.blobs.url) }}
- "blobs.url: workers.{{ $name }} reads problems and models from the blob store"
{{- end }}
{{- end }}
{{- if .Values.workers.generate.enabled }}
{{- $config := merge (deepCopy (dig "config" dict .Values.workers.generate)) .Values.config }}
{{- if not (or (hasKey $config "ASAP_EVALUATOR__BASE_URL") (eq (len .Values.serving.models) 1)) }}
- "workers.generate.config.ASAP_EVALUATOR__BASE_URL: name the server that is asked; it is clear only where one model is served"
{{- end }}
{{- end }}
{{- if .Values.workers.grade.enabled }}
{{- if and .Values.production .Values.secrets.blobs.name (not .Values.grading.blobsSecret) }}
- "grading.blobsSecret: production needs keys for grading pods that may only read"
{{- end }}
{{- if and (eq .Values.grading.level "vm") (not (dig "runtimeClassName" "" .Values.workers.grade)) }}
- "workers.grade.runtimeClassName: level vm needs the runtime class of the virtual machine"
{{- end }}
{{- if and (eq .Values.grading.level "namespaces") (not .Values.grading.seccompProfile) }}
- "grading.seccompProfile: level namespaces needs a profile on the nodes; the runtime's own forbids namespaces"
{{- end }}
{{- end }}
{{- end }}

{{- define "asap.checkNetwork" -}}
{{- $n := .Values.network }}
{{- if $n.enabled }}
{{- if not (or $n.database.peers .Values.builtin.postgres.enabled) }}
- "network.database.peers: say where the database is, or nothing reaches it"
{{- end }}
{{- if not (or $n.queue.peers .Values.builtin.redis.enabled) }}
- "network.queue.peers: say where the broker is, or nothing reaches it"
{{- end }}
{{- if and .Values.blobs.url (not $n.blobs.peers) }}
- "network.blobs.peers: say where the blob store is, or nothing reaches it"
{{- end }}
{{- if and .Values.workers.trainer.enabled (not $n.apiServer.peers) }}
- "network.apiServer.peers: say where the cluster's API is, or the trainer does not reach it"
{{- end }}
{{- if and (dig "ASAP_LLM__MODEL" "" .Values.config) (not (or $n.llm.peers $n.llm.fqdns)) }}
- "network.llm.peers: say where the LLM server is, or the anchor does not reach it"
{{- end }}
{{- if and .Values.secrets.otlp.name (not $n.otlp.peers) }}
- "network.otlp.peers: say where the trace collector is, or nothing reaches it"
{{- end }}
{{- if and .Values.secrets.webhooks.name (not $n.webhooks.peers) }}
- "network.webhooks.peers: say where the receivers are, or the gateway does not reach them"
{{- end }}
{{- end }}
{{- end }}

{{/* All components, models among them, by the path of their values. */}}
{{- define "asap.paths" -}}
{{- range $name, $component := include "asap.components" . | fromYaml }}
{{ eq $name "gateway" | ternary $name (printf "workers.%s" $name) }}:
  {{- toYaml $component | nindent 2 }}
{{- end }}
{{- range $name, $own := .Values.serving.models }}
serving.models.{{ $name }}:
  {{- include "asap.served" (list $ $name $own) | nindent 2 }}
{{- end }}
{{- end }}

{{- define "asap.checkComponents" -}}
{{- range $path, $component := include "asap.paths" . | fromYaml }}
{{- $scaling := $component.autoscaling }}
{{- if gt (int $scaling.min) (int $scaling.max) }}
- "{{ $path }}.autoscaling.min: more than autoscaling.max"
{{- end }}
{{- if and (eq $scaling.kind "hpa") (lt (int $scaling.min) 1) }}
- "{{ $path }}.autoscaling.min: only keda scales to 0"
{{- end }}
{{- if and (eq $scaling.kind "keda") (or (eq $path "gateway") (hasPrefix "serving" $path)) }}
- "{{ $path }}.autoscaling.kind: keda counts items of stages; take hpa"
{{- end }}
{{- if and (eq $scaling.kind "hpa") (hasPrefix "serving" $path) }}
- "{{ $path }}.autoscaling.kind: served models are not scaled; set replicas"
{{- end }}
{{- if eq $scaling.kind "keda" }}
{{- if and (eq $.Values.keda.trigger "postgresql") (not $.Values.keda.connection.name) }}
- "keda.connection.name: name the Secret with the connection string for {{ $path }}"
{{- end }}
{{- if and (eq $.Values.keda.trigger "prometheus") (not $.Values.keda.prometheusAddress) }}
- "keda.prometheusAddress: {{ $path }} is scaled by a metric; say where Prometheus is"
{{- end }}
{{- end }}
{{- if and $component.weights.source (hasKey (merge (deepCopy $component.config) $.Values.config) "ASAP_SURPRISAL__MODEL") (eq $component.name "surprisal") }}
- "{{ $path }}.weights.source: one of it and ASAP_SURPRISAL__MODEL"
{{- end }}
{{- if and $component.weights.source (not (hasPrefix "s3://" $component.weights.source)) $.Values.network.enabled (not $.Values.network.weights.peers) }}
- "network.weights.peers: {{ $path }}.weights is fetched from the hub; say where it is"
{{- end }}
{{- if and (hasPrefix "s3://" $component.weights.source) (not $.Values.blobs.url) }}
- "blobs.url: {{ $path }}.weights lies in the blob store; say where it is"
{{- end }}
{{- if and (hasPrefix "serving" $path) (not (or $component.weights.source $component.path)) }}
- "{{ $path }}.weights.source: say what is served, by this or by path"
{{- end }}
{{- if and (or $component.path $component.weights.source) (not (include "asap.modelClaim" $)) }}
- "modelCache.create: {{ $path }} has a model, which needs a place; make one, or name modelCache.existingClaim"
{{- end }}
{{- end }}
{{- end }}

{{- define "asap.checkProduction" -}}
{{- range $name, $builtin := .Values.builtin }}
{{- if $builtin.enabled }}
- "builtin.{{ $name }}.enabled: has no replica and no backup; production needs one of its own"
{{- end }}
{{- end }}
{{- if .Values.secrets.generate }}
- "secrets.generate: production needs Secrets of its own"
{{- end }}
{{- if not .Values.network.enabled }}
- "network.enabled: production needs the policies"
{{- end }}
{{- $used := list "light" }}
{{- range $path, $component := include "asap.paths" . | fromYaml }}
{{- $used = append $used $component.image }}
{{- if and $component.weights.source (not $component.weights.sha256) }}
- "{{ $path }}.weights.sha256: production needs the weights' hash"
{{- end }}
{{- if $component.path }}
- "{{ $path }}.path: production serves weights that are checked; take weights.source"
{{- end }}
{{- end }}
{{- if .Values.workers.trainer.enabled }}
{{- $used = append $used "train" }}
{{- end }}
{{- range $key := uniq $used }}
{{- if not (index $.Values.images $key).digest }}
- "images.{{ $key }}.digest: production needs images by digest"
{{- end }}
{{- end }}
{{- end }}
