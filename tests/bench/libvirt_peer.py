"""One way to collect libvirt's statistics, on demand: every line on standard input is one collection, answered by a line.

  libvirt_peer.py bulk | ceilometer | procfs      the domains whose names begin with "bench"

`bulk` is virConnectGetAllDomainStats with the groups that ceilometer's figures come from, `ceilometer` the calls that its
pollsters make on its LibvirtInspector for one instance and cycle, `procfs` what the kernel has in files.
"""
import os
import sys
import types

import libvirt

URI = "qemu:///system"
libvirt.registerErrorHandler(lambda *_: None, None)
connection = libvirt.openReadOnly(URI)
domains = [d for d in connection.listAllDomains() if d.name().startswith("bench")]


def bulk():
    names = ("STATE", "CPU_TOTAL", "BALLOON", "VCPU", "INTERFACE", "BLOCK")
    groups = sum(getattr(libvirt, "VIR_DOMAIN_STATS_" + name) for name in names)
    return lambda: connection.domainListGetStats(domains, groups, 0)


def ceilometer():
    from ceilometer import service
    from ceilometer.compute.virt.libvirt import inspector

    conf = service.prepare_service(argv=["bench"], config_files=[])
    conf.set_override("libvirt_uri", URI)
    look = inspector.LibvirtInspector(conf)
    instances = [types.SimpleNamespace(id=d.UUIDString(), name=d.name()) for d in domains]

    def collect():
        for instance in instances:
            look.inspect_instance(instance, None)
            list(look.inspect_vnics(instance, None))
            list(look.inspect_disks(instance, None))
            list(look.inspect_disk_info(instance, None))

    return collect


def procfs():
    pids = [int(open(f"/run/libvirt/qemu/{d.name()}.pid").read()) for d in domains]

    def collect():
        open("/proc/net/dev").read()
        for pid in pids:
            open(f"/proc/{pid}/statm").read()
            open(f"/proc/{pid}/io").read()
            for tid in os.listdir(f"/proc/{pid}/task"):
                open(f"/proc/{pid}/task/{tid}/schedstat").read()

    return collect


collect = {"bulk": bulk, "ceilometer": ceilometer, "procfs": procfs}[sys.argv[1]]()
collect()
print("ready", len(domains), flush=True)
for _ in sys.stdin:
    collect()
    print("done", flush=True)
