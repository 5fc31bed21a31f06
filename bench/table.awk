# Medians as a table for people: `CPUS KIND NAME HOST TEREM QEMU` in. The geometric mean is over programs and workloads.

function ratio(a, b) { return a == "-" || b == "-" ? "-" : sprintf("%.2f", a / b) }
function number(x, unit) {
  if (x == "-") return x
  return unit == "s" ? sprintf("%.2f", x) : x >= 100000 ? sprintf("%.0f k", x / 1000) : sprintf(x >= 100 ? "%.0f" : "%.1f", x)
}
function mean(cpus) {
  if (n[cpus]) printf "%-26s %5s %10s %10s %10s %11.2f %12.2f\n", "geometric mean", "", "", "", "", exp(faster[cpus] / n[cpus]), exp(native[cpus] / n[cpus])
}
$1 != cpus {
  mean(cpus)
  cpus = $1
  printf "%s%-26s %5s %10s %10s %10s %11s %12s\n", (NR > 1 ? "\n" : ""), cpus (cpus == 1 ? " vCPU" : " vCPUs"), "unit", "native", "terem", "TCG", "TCG/terem", "terem/native"
}
{
  unit = $2 == "workload" ? "ns" : "s"
  name = $2 == "boot" ? ($3 == "pid1" ? "start to PID 1" : "start to login prompt") : $3
  printf "%-26s %5s %10s %10s %10s %11s %12s\n", name, unit, number($4, unit), number($5, unit), number($6, unit), ratio($6, $5), ratio($5, $4)
  if ($2 != "boot") { n[cpus]++; faster[cpus] += log($6 / $5); native[cpus] += log($5 / $4) }
}
END { mean(cpus) }
