# What a build's or an init's shell script does: thousands of processes, pipes and tests of files.
i=0
while [ $i -lt 250 ]; do
  i=$((i + 1))
  name=$(printf '%04d' $i | tr 0-9 a-j)
  echo "$name" | sed 's/a/A/g' | cut -c2-
  [ -e "/nowhere/$name" ] || /bin/true
  basename "/usr/share/$name"
  (exec expr $i \* $i)
done
