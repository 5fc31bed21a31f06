# Medians as a picture (SVG): for each row how many times faster than TCG terem is (bars, one for each number of vCPUs) and
# the host itself (ticks), on a logarithmic scale. `CPUS KIND NAME HOST TEREM QEMU` in; `title` is set by the caller.

function across(times) { return LEFT + WIDTH * (log(times < LEAST ? LEAST : times > MOST ? MOST : times) - log(LEAST)) / (log(MOST) - log(LEAST)) }
function text(x, y, anchor, style, words) {
  printf "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\" %s>%s</text>\n", x, y, anchor, style, words
}
function line(x1, y1, x2, y2, style) {
  printf "<line x1=\"%.1f\" y1=\"%.1f\" x2=\"%.1f\" y2=\"%.1f\" %s/>\n", x1, y1, x2, y2, style
}
function bar(y, cpus, terem, native,    from, to) {
  from = terem < 1 ? terem : 1; to = terem < 1 ? 1 : terem
  printf "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%d\" fill=\"%s\"/>\n", across(from), y, \
    across(to) - across(from), BAR - 1, COLOUR[place[cpus]]
  text(across(to) + 3, y + BAR - 2, "start", "font-size=\"8\" fill=\"#444\"", sprintf("%.1f", terem))
  if (native) line(across(native), y, across(native), y + BAR - 1, "stroke=\"#c33\" stroke-width=\"2\"")
}
BEGIN {
  LEFT = 150; WIDTH = 520; BAR = 9; LEAST = 0.5; MOST = 64
  COLOUR[1] = "#2b6cb0"; COLOUR[2] = "#90bce8"; COLOUR[3] = "#c9ddf2"
}
{
  if (!($1 in place)) { place[$1] = ++sizes; size[sizes] = $1 }
  name = $2 == "boot" ? ($3 == "pid1" ? "start to PID 1" : "start to login") : $3
  if (!(name in seen)) { seen[name] = 1; rows[++count] = name; kind[name] = $2 }
  faster[name, $1] = $6 / $5
  if ($4 != "-") native[name, $1] = $6 / $4
  if ($2 != "boot") { n[$1]++; sum[$1] += log($6 / $5); natives[$1] += log($6 / $4) }
}
END {
  rows[++count] = "geometric mean"
  for (i = 1; i <= sizes; i++) {
    c = size[i]
    faster["geometric mean", c] = exp(sum[c] / n[c]); native["geometric mean", c] = exp(natives[c] / n[c])
  }
  step = sizes * BAR + 5; top = 56; bottom = top + count * step
  printf "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\">\n", LEFT + WIDTH + 20, bottom + 30
  print "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>"
  text(LEFT, 18, "start", "font-size=\"13\" font-weight=\"bold\"", title ": how many times faster")
  for (i = 1; i <= sizes; i++) {
    printf "<rect x=\"%d\" y=\"28\" width=\"10\" height=\"10\" fill=\"%s\"/>\n", LEFT + (i - 1) * 110, COLOUR[i]
    text(LEFT + (i - 1) * 110 + 14, 37, "start", "font-size=\"10\"", "terem, " size[i] (size[i] == 1 ? " vCPU" : " vCPUs"))
  }
  line(LEFT + sizes * 110 + 4, 28, LEFT + sizes * 110 + 4, 38, "stroke=\"#c33\" stroke-width=\"2\"")
  text(LEFT + sizes * 110 + 14, 37, "start", "font-size=\"10\"", "the host itself, without a guest")
  for (times = LEAST; times <= MOST; times *= 2) {
    line(across(times), top - 4, across(times), bottom, times == 1 ? "stroke=\"#333\"" : "stroke=\"#ddd\"")
    text(across(times), bottom + 14, "middle", "font-size=\"10\"", times == 1 ? "TCG" : times "×")
  }
  for (r = 1; r <= count; r++) {
    name = rows[r]; y = top + (r - 1) * step
    text(LEFT - 8, y + step / 2 + 1, "end", "font-size=\"10\"" (r == count ? " font-weight=\"bold\"" : ""), name)
    for (i = 1; i <= sizes; i++) if ((name, size[i]) in faster) bar(y + (i - 1) * BAR, size[i], faster[name, size[i]], native[name, size[i]])
  }
  print "</svg>"
}
