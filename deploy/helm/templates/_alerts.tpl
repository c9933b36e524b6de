{{/* The alerts; docs/operations.md has a paragraph for each. (list root namespace-matcher) */}}
{{- define "asap.alerts" -}}
{{- $rules := (index . 0).Values.monitoring.rules -}}
{{- $here := index . 1 -}}
- alert: AsapItemsWait
  expr: max by (stage) (asap_oldest_due_seconds{ {{- $here -}} }) > 600
  for: 5m
  labels: {severity: warning}
  annotations: {summary: "The oldest due item of {{`{{ $labels.stage }}`}} waits for more than ten minutes"}
- alert: AsapLeasesLost
  expr: >-
    sum by (stage) (increase(asap_leases_lost_total{ {{- $here -}} }[30m]))
    > 0.01 * sum by (stage) (increase(asap_items_total{ {{- $here -}} }[30m])) + 1
  labels: {severity: warning}
  annotations: {summary: "Workers of {{`{{ $labels.stage }}`}} fall silent with more than one item in a hundred"}
- alert: AsapStaleWrites
  expr: sum by (stage) (increase(asap_stale_writes_total{ {{- $here -}} }[15m])) > 10
  labels: {severity: warning}
  annotations: {summary: "Workers of {{`{{ $labels.stage }}`}} come back after their leases; their writes are refused"}
- alert: AsapBreakerOpen
  expr: max by (upstream) (asap_breaker_open{ {{- $here -}} }) > 0
  for: 5m
  labels: {severity: warning}
  annotations: {summary: "The LLM server {{`{{ $labels.upstream }}`}} is left alone, it fails"}
- alert: AsapSelfMessageLate
  expr: max by (pod) (asap_worker_selfmessage_age_seconds{ {{- $here -}} }) > 90 and on (pod) max by (pod) (asap_queue_up{ {{- $here -}} }) > 0
  for: 1m
  labels: {severity: warning}
  annotations: {summary: "No message comes through to {{`{{ $labels.pod }}`}}, and the broker is well"}
- alert: AsapQueueDown
  expr: max(asap_queue_up{ {{- $here -}} }) < 1
  for: 5m
  labels: {severity: warning}
  annotations: {summary: "No process reaches the broker; work goes on, slower"}
- alert: AsapDatabaseDown
  expr: >-
    sum(rate(asap_http_seconds_count{ {{- $here -}} ,route="/readyz",status="503"}[2m])) > 0
    unless sum(rate(asap_http_seconds_count{ {{- $here -}} ,route="/readyz",status="200"}[2m])) > 0
  for: 1m
  labels: {severity: critical}
  annotations: {summary: "No gateway is ready: the database does not answer, or its schema is an old one"}
{{- if (index . 0).Values.monitoring.serviceMonitor.enabled }}{{/* which gives series their service */}}
- alert: AsapGatewayAway
  expr: absent(asap_queue_up{ {{- $here -}} ,service="{{ include "asap.fullname" (index . 0) }}-gateway"})
  for: 5m
  labels: {severity: critical}
  annotations: {summary: "Prometheus reads no gateway: none runs, or it is not let in"}
{{- end }}
- alert: AsapErrorsFast
  expr: {{ include "asap.burn" (list $here "5m" "0.014") }} and {{ include "asap.burn" (list $here "1h" "0.014") }}
  labels: {severity: critical}
  annotations: {summary: "The gateway's errors use up a month's budget in two days"}
- alert: AsapErrorsSlow
  expr: {{ include "asap.burn" (list $here "30m" "0.006") }} and {{ include "asap.burn" (list $here "6h" "0.006") }}
  labels: {severity: warning}
  annotations: {summary: "The gateway's errors use up a month's budget in five days"}
{{- if (index . 0).Values.workers.grade.enabled }}
- alert: AsapSandboxMissing
  expr: min(asap_sandbox_level{ {{- $here -}} ,service="{{ include "asap.fullname" (index . 0) }}-grade"}) < {{ eq (index . 0).Values.grading.level "namespaces" | ternary 2 1 }}
  for: 5m
  labels: {severity: critical}
  annotations: {summary: "A grading pod has no sandbox that holds; programs wait"}
{{- end }}
- alert: AsapDiskFull
  expr: kubelet_volume_stats_available_bytes{ {{- $here -}} } < 0.1 * kubelet_volume_stats_capacity_bytes{ {{- $here -}} }
  for: 5m
  labels: {severity: warning}
  annotations: {summary: "The volume {{`{{ $labels.persistentvolumeclaim }}`}} has less than a tenth left"}
{{- if gt (float64 $rules.costPerHour) 0.0 }}
- alert: AsapCostHigh
  expr: sum(increase(asap_llm_cost_total{ {{- $here -}} }[1h])) > {{ $rules.costPerHour }}
  labels: {severity: warning}
  annotations: {summary: "LLM calls of the last hour cost more than {{ $rules.costPerHour }} US dollars"}
{{- end }}
{{- if $rules.certificates }}
- alert: AsapCertificateExpires
  expr: min by (name) (certmanager_certificate_expiration_timestamp_seconds{ {{- $here -}} }) - time() < 1209600
  labels: {severity: warning}
  annotations: {summary: "The certificate {{`{{ $labels.name }}`}} ends within two weeks"}
{{- end }}
{{- with $rules.backupCronJob }}
- alert: AsapBackupOld
  expr: time() - max(kube_cronjob_status_last_successful_time{ {{- $here -}} ,cronjob="{{ . }}"}) > 93600
  labels: {severity: critical}
  annotations: {summary: "The last good backup is older than 26 hours"}
{{- end }}
{{- end }}

{{/* Share of answers that were our fault, above a bound. (list namespace-matcher window bound) */}}
{{- define "asap.burn" -}}
{{- $of := printf "%s,route!~\"/(healthz|readyz|metrics)\"" (index . 0) -}}
sum(rate(asap_http_seconds_count{ {{- $of -}} ,status=~"5.."}[{{ index . 1 }}])) / sum(rate(asap_http_seconds_count{ {{- $of -}} }[{{ index . 1 }}])) > {{ index . 2 }}
{{- end }}
