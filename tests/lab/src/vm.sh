# What a host-under-test VM does after its root file system is there, run by bash as root (tests/guest/src/bin/host.rs is
# PID 1). Before it stand the words MODULES (a directory lib/modules of its kernel) and SCRATCH (a disk for direct I/O);
# after it the caller's commands.
set -u
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
umask 022

mkdir -p /dev/pts /dev/shm /scratch /lib/modules
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in cpu memory io pids cpuset; do
  echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control || :
done
mount --bind "$MODULES" /lib/modules
modprobe -a kvm-amd tun vhost_net virtio_blk virtio_net loop ext4
# There is no udev here that would set this.
if [ -e /dev/kvm ]; then chmod 666 /dev/kvm; fi
mount -t ext4 "$SCRATCH" /scratch
mkdir -p /out/lab-cache /scratch/lab-cache
mount --bind /out/lab-cache /scratch/lab-cache
ip link set lo up
hostname "lab-$(uname -r | cut -d. -f1,2)"
