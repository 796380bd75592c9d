# Supervisor of a lab, run by bash as the first process of new mount and network namespaces.
#   bash -c THIS supervisor SCRATCH_DIR CACHE_DIR
# It builds the private world, answers "ready", and then obeys lines on standard input ("libvirtd PATH" starts one
# and answers with its pid). Only the process that made the lab holds the other end: when that ends in whatever
# way, input ends, and the supervisor ends every process of the namespaces, which vanish with the last of them.
# Bash and not sh: as the subreaper it must collect daemonized QEMUs at once, or libvirtd takes them for alive.
set -eu
scratch=$1 cache=$2

fail() { echo "error $*"; exit 1; }

# Whether process $1 lives in one of our two namespaces (true for nobody outside: checked before anything else).
is_ours() { [[ /proc/$1/ns/mnt -ef /proc/$$/ns/mnt || /proc/$1/ns/net -ef /proc/$$/ns/net ]]; }
if is_ours "$PPID" || is_ours 1; then fail "the namespaces are not private"; fi

end_all() {
  local pid pids round
  for round in {1..200}; do
    pids=()
    for pid in /proc/[0-9]*; do
      pid=${pid#/proc/}
      if [[ $pid != "$$" ]] && is_ours "$pid"; then pids+=("$pid"); fi
    done
    if ((${#pids[@]} == 0)); then break; fi
    kill -KILL "${pids[@]}" 2>/dev/null || :
    sleep 0.02
  done
  rm -rf --one-file-system "$scratch"
}
trap end_all EXIT
# Traps and not ignored signals: those would stay ignored in libvirtd. PIPE: the owner ended while we started.
trap 'exit 1' HUP INT TERM PIPE

# A /sys that shows this network namespace, with the file systems that the host mounted below it.
private_sys() {
  local old=$scratch/sys point
  mkdir "$old"
  mount --rbind /sys "$old"
  mount -t sysfs lab /sys
  while read -r _ _ _ _ point _; do
    case $point in "$old"/*) mount --bind "$point" "/sys/${point#"$old"/}" 2>/dev/null || : ;; esac
  done </proc/self/mountinfo
  umount --lazy "$old"
  rmdir "$old"
}

# Empty directories in the place of libvirt's; an empty /run also hides systemd and dbus from libvirtd, which
# would otherwise ask the host's machined for cgroups.
private_directories() {
  local dir
  mount -t tmpfs -o mode=755 lab /run
  mkdir -p /run/lab "$scratch/log"
  for dir in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt; do
    [[ -d $dir ]] || fail "$dir does not exist: install libvirt's daemon"
  done
  mount -t tmpfs -o mode=755 lab /etc/libvirt
  mount -t tmpfs -o mode=755 lab /var/lib/libvirt
  mount --bind "$scratch/log" /var/log/libvirt
  mount --bind "$cache" /var/cache/libvirt
}

# A host of its own, by name and UUID: libvirt migrates no guest to the host it runs on.
configure() {
  echo "lab-$$" >/proc/sys/kernel/hostname
  echo "host_uuid = \"$(</proc/sys/kernel/random/uuid)\"" >/etc/libvirt/libvirtd.conf
  cat >>/etc/libvirt/libvirtd.conf <<'CONF'
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_ro_perms = "0777"
unix_sock_rw_perms = "0700"
log_outputs = "3:stderr"
CONF
  # All capabilities: QEMU runs as root and must reach images below directories of other users.
  cat >/etc/libvirt/qemu.conf <<'CONF'
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
clear_emulator_capabilities = 0
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
CONF
}

private_network() {
  local setting
  # No neighbour discovery or multicast reports: every packet on a tap is one that a test asked for.
  for setting in /proc/sys/net/ipv6/conf/{default,all}/disable_ipv6; do
    if [[ -e $setting ]]; then echo 1 >"$setting"; fi
  done
  ip link set lo up
}

mount --make-rprivate / || fail "cannot make mounts private"
private_sys || fail "cannot mount a private /sys"
private_directories || fail "cannot mount private directories"
configure
private_network || fail "cannot set up the network namespace"
echo ready

while read -r word argument; do
  case $word in
    libvirtd)
      "$argument" --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirtd.pid \
        </dev/null >>"$scratch/log/libvirtd.log" 2>&1 &
      echo "pid $!"
      disown # Its end is no news; it is collected all the same.
      ;;
    *) echo "error unknown word $word" ;;
  esac
done
