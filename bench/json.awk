# Medians (first file) and all results (second) as JSON.

function value(x) { return x == "-" ? "null" : x }
FNR == 1 { file++ }
file == 1 {
  unit = $2 == "workload" ? "ns" : "s"
  medians = medians sprintf("%s\n  {\"cpus\": %d, \"kind\": \"%s\", \"name\": \"%s\", \"unit\": \"%s\", \"native\": %s, \"terem\": %s, \"qemu\": %s}", \
    (medians ? "," : ""), $1, $2, $3, unit, value($4), value($5), value($6))
  if ($2 != "boot") { n[$1]++; faster[$1] += log($6 / $5); native[$1] += log($5 / $4) }
}
file == 2 { runs = runs sprintf("%s\n  [\"%s\", %d, \"%s\", \"%s\", %s]", (runs ? "," : ""), $1, $2, $3, $4, $5) }
END {
  for (cpus in n) {
    means = means sprintf("%s\"%d\": {\"terem_over_tcg_speed\": %.3f, \"terem_over_native_time\": %.3f}", (means ? ", " : ""), cpus, exp(faster[cpus] / n[cpus]), exp(native[cpus] / n[cpus]))
  }
  printf "{\"benchmark\": \"cpu\", \"machine\": %s, \"rounds\": %d,\n \"geometric_mean\": {%s},\n \"medians\": [%s\n ],\n \"runs\": [%s\n ]}\n", machine, rounds, means, medians, runs
}
