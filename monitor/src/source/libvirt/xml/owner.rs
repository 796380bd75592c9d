//! Who runs a domain: what OpenStack Nova, oVirt and KubeVirt leave in its `<metadata>`, each in a namespace of its own.
//!
//! Tenants can write metadata, too: nothing here is trusted further than being shown.

use roxmltree::Node;

use super::{attribute, child, text};
use crate::inventory::Owner;

/// Start of the namespace of Nova's metadata; `1.0` and `1.1` are in use (`nova/virt/libvirt/config.py`).
const NOVA: &str = "http://openstack.org/xmlns/libvirt/nova/";
/// Start of the namespace of oVirt's metadata (`vdsm/virt/xmlconstants.py`).
const OVIRT: &str = "http://ovirt.org/vm/";
/// The namespace of KubeVirt's metadata (`pkg/virt-launcher/virtwrap/api/schema.go`).
const KUBEVIRT: &str = "http://kubevirt.io";

/// Whose it is; nothing known if nobody left a word.
pub(super) fn read(domain: Node<'_, '_>, name: &str) -> Owner {
    let Some(metadata) = child(domain, "metadata") else { return Owner::default() };
    if let Some(instance) = within(metadata, NOVA, "instance") {
        return of_nova(instance);
    }
    if let Some(vm) = within(metadata, KUBEVIRT, "kubevirt") {
        return of_kubevirt(vm, name);
    }
    within(metadata, OVIRT, "vm").map(|vm| of_ovirt(vm, name)).unwrap_or_default()
}

fn of_nova(instance: Node<'_, '_>) -> Owner {
    let owner = within(instance, NOVA, "owner");
    let of_owner = |name| owner.and_then(|owner| within(owner, NOVA, name));
    Owner {
        manager: Some("nova"),
        instance_name: within(instance, NOVA, "name").map(text),
        flavor: within(instance, NOVA, "flavor").and_then(|flavor| attribute(flavor, "name")),
        project: of_owner("project").map(text),
        project_id: of_owner("project").and_then(|project| attribute(project, "uuid")),
        user: of_owner("user").map(text),
        user_id: of_owner("user").and_then(|user| attribute(user, "uuid")),
        // A domain that starts from a volume has no image.
        image_id: within(instance, NOVA, "root")
            .filter(|root| root.attribute("type") == Some("image"))
            .and_then(|root| attribute(root, "uuid")),
        ..Owner::default()
    }
}

/// KubeVirt calls a domain `NAMESPACE_NAME`; neither can hold an underscore.
fn of_kubevirt(vm: Node<'_, '_>, name: &str) -> Owner {
    let (project, instance_name) = match name.split_once('_') {
        Some((namespace, name)) => (Some(namespace.to_owned()), Some(name.to_owned())),
        None => (None, None),
    };
    let instance_id = within(vm, KUBEVIRT, "uid").map(text);
    Owner { manager: Some("kubevirt"), instance_id, instance_name, project, ..Owner::default() }
}

/// oVirt calls a domain as its user does.
fn of_ovirt(vm: Node<'_, '_>, name: &str) -> Owner {
    Owner {
        manager: Some("ovirt"),
        instance_name: Some(name.to_owned()),
        cluster_version: within(vm, OVIRT, "clusterVersion").map(text),
        ..Owner::default()
    }
}

/// A child of that name in a namespace that begins so.
fn within<'a, 'i>(node: Node<'a, 'i>, namespace: &str, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| {
        let tag = child.tag_name();
        tag.name() == name && tag.namespace().is_some_and(|ns| ns.starts_with(namespace))
    })
}

#[cfg(test)]
mod tests {
    use super::super::parse_domain;
    use super::*;

    fn owner(name: &str, metadata: &str) -> Owner {
        let uuid = "00112233445566778899aabbccddeeff";
        let head = format!("<domain><name>{name}</name><uuid>{uuid}</uuid>");
        parse_domain(&format!("{head}<metadata>{metadata}</metadata></domain>")).unwrap().owner
    }

    #[test]
    fn kubevirt_tells_a_uid_and_names_domains_by_namespace() {
        let metadata = "<kubevirt xmlns='http://kubevirt.io'><uid>8b2c-17</uid><graceperiod/></kubevirt>";
        let expected = Owner {
            manager: Some("kubevirt"),
            instance_id: Some("8b2c-17".into()),
            instance_name: Some("web".into()),
            project: Some("shop".into()),
            ..Owner::default()
        };
        assert_eq!(owner("shop_web", metadata), expected);
        let unnamed = Owner { instance_name: None, project: None, ..expected };
        assert_eq!(owner("shop-web", metadata), unnamed);
    }

    #[test]
    fn ovirt_tells_its_clusters_version() {
        let metadata =
            "<o:vm xmlns:o='http://ovirt.org/vm/1.0'><o:clusterVersion>4.7</o:clusterVersion></o:vm>";
        let owner = owner("web", metadata);
        assert_eq!((owner.manager, owner.cluster_version.as_deref()), (Some("ovirt"), Some("4.7")));
        assert_eq!(owner.instance_name.as_deref(), Some("web"));
    }

    #[test]
    fn novas_volume_is_no_image() {
        let nova = |root: &str| {
            let owner =
                "<n:owner><n:user uuid='u1'>alice</n:user><n:project uuid='p1'>shop</n:project></n:owner>";
            let ns = "http://openstack.org/xmlns/libvirt/nova/1.1";
            format!("<n:instance xmlns:n='{ns}'><n:name>web</n:name>{owner}<n:root {root}/></n:instance>")
        };
        let of_image = owner("instance-1", &nova("type='image' uuid='i1'"));
        assert_eq!((of_image.user_id.as_deref(), of_image.project_id.as_deref()), (Some("u1"), Some("p1")));
        assert_eq!((of_image.manager, of_image.image_id.as_deref()), (Some("nova"), Some("i1")));
        assert_eq!(owner("instance-1", &nova("type='volume' uuid='v1'")).image_id, None);
    }

    #[test]
    fn other_namespaces_are_left_alone() {
        assert_eq!(
            owner("a_b", "<x:vm xmlns:x='http://example.org/'/><instance/><kubevirt/>"),
            Owner::default()
        );
    }
}
