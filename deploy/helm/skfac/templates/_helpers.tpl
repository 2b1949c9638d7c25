{{- define "skfac.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-skfac" .Release.Name) (contains "skfac" .Release.Name) -}}
{{- $name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{/* In full: a trainer's resolver need not know the cluster's search list. */}}
{{- define "skfac.target" -}}
dns:///{{ include "skfac.fullname" . }}-headless.{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}:50051
{{- end }}

{{- define "skfac.selector" -}}
app.kubernetes.io/name: skfac
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "skfac.testSelector" -}}
app.kubernetes.io/name: skfac
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end }}

{{- define "skfac.labels" -}}
app.kubernetes.io/name: skfac
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "skfac.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The settings as lines of TOML: JSON's scalars and lists are TOML's, too. */}}
{{- define "skfac.settings" -}}
{{- $derived := fromYaml (include "skfac.derived" .) -}}
{{- $fitted := fromYaml (include "skfac.fitted" .) -}}
{{- $settings := merge $derived (deepCopy .Values.config) $fitted -}}
{{- range $name, $value := $settings }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{- end }}

{{/* Settings that follow from other values; values.schema.json refuses them in `config`.
     Prometheus comes from another machine: the NetworkPolicy says who may. */}}
{{- define "skfac.derived" -}}
address: 0.0.0.0:50051
health_address: 0.0.0.0:50052
metrics_address: 0.0.0.0:9464
insecure_remote: {{ .Values.insecureRemote }}
insecure_metrics: true
{{- if .Values.tls.secretName }}
tls_certificate: /etc/skfac-tls/tls.crt
tls_key: /etc/skfac-tls/tls.key
{{- end }}
{{- if .Values.tls.clientCA }}
tls_client_ca: /etc/skfac-tls/ca.crt
{{- end }}
{{- with .Values.access.secretName }}
access_file: /etc/skfac-access/{{ $.Values.access.key }}
{{- end }}
{{- if .Values.state.enabled }}
state_dir: /var/lib/skfac
{{- end }}
device: {{ ternary "cuda" "cpu" (gt (int .Values.gpu.count) 0) }}
{{- end }}

{{/* Limits that fit the pod's memory, for those that `config` does not name. */}}
{{- define "skfac.fitted" -}}
{{- with (.Values.resources.limits | default dict).memory -}}
{{- $quarter := max 1 (div (include "skfac.bytes" . | int64) 4) -}}
max_session_bytes: {{ $quarter }}
max_history_bytes: {{ $quarter }}
{{- end -}}
{{- end }}

{{/* A quantity of Kubernetes, such as 4Gi, in bytes. Numbers of a values file are floats. */}}
{{- define "skfac.bytes" -}}
{{- if kindIs "string" . -}}
{{- $binary := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976 -}}
{{- $decimal := dict "" 1 "m" 0.001 "K" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 -}}
{{- $unit := get (merge $binary $decimal) (regexFind "[A-Za-z]*$" .) -}}
{{- mulf (float64 (regexFind "^[0-9.]+" .)) $unit | int64 -}}
{{- else -}}
{{- int64 . -}}
{{- end -}}
{{- end }}

{{/* Seconds from SIGTERM to SIGKILL, and before SIGTERM: the server takes grace_s for work
     and as long again for calls, then saves. */}}
{{- define "skfac.terminationSeconds" -}}
{{- $grace := .Values.config.grace_s | default 5 | float64 | ceil | int -}}
{{- $save := ternary .Values.state.saveSeconds 0 .Values.state.enabled | int -}}
{{- add .Values.preStopSleepSeconds (mul 2 $grace) $save 10 -}}
{{- end }}

{{- define "skfac.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "skfac.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Values that contradict each other, which a schema cannot say as well. */}}
{{- define "skfac.check" -}}
{{- if and (not .Values.tls.secretName) (not .Values.insecureRemote) -}}
{{- fail "Set tls.secretName to a kubernetes.io/tls Secret, or insecureRemote=true to serve without encryption in a network that you trust." -}}
{{- end -}}
{{- if and .Values.tls.secretName .Values.insecureRemote -}}
{{- fail "tls.secretName and insecureRemote=true contradict each other: choose one." -}}
{{- end -}}
{{- if and .Values.tls.secretName (not .Values.tls.clientCA) (not .Values.access.secretName) -}}
{{- fail "With TLS the servers still have to know who calls: set access.secretName, or tls.clientCA=true, or both." -}}
{{- end -}}
{{- if and .Values.tls.clientCA (not .Values.tls.secretName) -}}
{{- fail "tls.clientCA=true needs tls.secretName." -}}
{{- end -}}
{{- if and .Values.keda.enabled (not .Values.keda.prometheusAddress) -}}
{{- fail "keda.enabled=true needs keda.prometheusAddress, such as http://prometheus.monitoring:9090." -}}
{{- end -}}
{{- if and .Values.keda.enabled (gt (int .Values.keda.minReplicas) (int .Values.keda.maxReplicas)) -}}
{{- fail (printf "keda.minReplicas=%v is more than keda.maxReplicas=%v." .Values.keda.minReplicas .Values.keda.maxReplicas) -}}
{{- end -}}
{{- end }}
