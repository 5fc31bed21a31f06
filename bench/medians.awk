# Results to medians: lines `SIDE CPUS KIND NAME VALUE` in, `CPUS KIND NAME HOST TEREM QEMU` out, in the order in which
# they came; `-` where there is no value.

function median(key,    n, values, i, j, value) {
  n = split(all[key], values, " ")
  if (!n) return "-"
  for (i = 2; i <= n; i++) {
    value = values[i] + 0
    for (j = i - 1; j > 0 && values[j] + 0 > value; j--) values[j + 1] = values[j]
    values[j + 1] = value
  }
  return n % 2 ? values[(n + 1) / 2] + 0 : (values[n / 2] + values[n / 2 + 1]) / 2
}
{
  row = $2 " " $3 " " $4
  if (!(row in seen)) { seen[row] = 1; rows[++count] = row }
  all[$1 " " row] = all[$1 " " row] " " $5
}
END {
  for (i = 1; i <= count; i++) print rows[i], median("host " rows[i]), median("terem " rows[i]), median("qemu " rows[i])
}
