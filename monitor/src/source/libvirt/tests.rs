//! The whole source against libvirt's test driver, which lives inside this process and has one domain.

use std::{os::unix::net::UnixListener, time::Instant};

use super::*;
use crate::inventory::DomainState;

const TEST_DRIVER: &str = "test:///default";

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn fast() -> Request {
    Request { groups: Some(Groups::fast()), ..Request::default() }
}

fn slow() -> Request {
    Request { groups: Some(Groups::slow()), ..Request::default() }
}

async fn connected() -> (Libvirt, Connected) {
    let mut libvirt = Libvirt::start(TEST_DRIVER);
    assert_eq!(libvirt.watch(fast()), Err(Busy), "not connected yet");
    match libvirt.next().await {
        Update::Connected(to) => (libvirt, to),
        other => panic!("{other:?}"),
    }
}

async fn sample(libvirt: &mut Libvirt) -> LibvirtSample {
    match libvirt.next().await {
        Update::Sample(sample) => *sample,
        other => panic!("{other:?}"),
    }
}

/// A socket that takes connections and never answers: a daemon that is stuck.
fn stuck_daemon() -> (UnixListener, std::path::PathBuf, String) {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("kvm-monitor-stuck-{}-{number}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let uri = format!("qemu+unix:///system?socket={}", path.display());
    (listener, path, uri)
}

#[test]
fn groups_are_a_set() {
    assert!(Groups::fast().contains(Groups::INTERFACE) && !Groups::fast().contains(Groups::BLOCK));
    assert!(Groups::slow().contains(Groups::BLOCK) && !Groups::slow().contains(Groups::INTERFACE));
}

/// Whatever no event told is known after the resynchronization at the latest.
#[test]
fn an_old_description_is_read_again_once() {
    let connection = connection::Connection::open_read_only(TEST_DRIVER).unwrap();
    let mut collector = Collector::new(Duty::Watch);
    let mut descriptions = |older_by: Duration| {
        collector.age(older_by);
        collector.collect(&connection, &fast()).unwrap().described.len()
    };
    assert_eq!([Duration::ZERO; 2].map(&mut descriptions), [1, 0]);
    assert_eq!([worker::RESYNC / 2; 3].map(&mut descriptions), [0, 1, 0]);
}

#[test]
fn a_domain_is_described_once_and_measured_each_time() {
    block_on(async {
        let (mut libvirt, to) = connected().await;
        assert_eq!(to.hypervisor.as_deref(), Some("TEST"));
        assert_eq!(to.uri, TEST_DRIVER);
        assert!(to.library_version.unwrap() >= Version { major: 6, minor: 0, release: 0 });

        libvirt.watch(fast()).unwrap();
        assert_eq!(libvirt.watch(fast()), Err(Busy));
        assert!(libvirt.outstanding_since(Duty::Watch).is_some());
        let first = sample(&mut libvirt).await;
        assert_eq!(libvirt.outstanding_since(Duty::Watch), None);
        assert!(first.window.begin <= first.window.end);
        assert_eq!((first.errors.as_slice(), first.gone.as_slice()), (&[][..], &[][..]));
        let [stats] = first.domains.as_slice() else { panic!("{first:?}") };
        let [Described { domain }] = first.described.as_slice() else { panic!("{first:?}") };
        assert_eq!((domain.name.as_str(), domain.uuid, domain.id), ("test", stats.uuid, Some(1)));
        assert_eq!((domain.state, stats.state), (DomainState::Running, Some(DomainState::Running)));
        assert_eq!(stats.cpu_time_ns, None, "the test driver tells nothing but the state");

        libvirt.watch(fast()).unwrap();
        let second = sample(&mut libvirt).await;
        assert_eq!((second.domains.len(), second.described.len(), second.gone.len()), (1, 0, 0));
        assert!(second.window.begin >= first.window.end);

        let uuid = stats.uuid;
        libvirt.watch(Request { describe: vec![uuid, DomainUuid([9; 16])], ..Request::default() }).unwrap();
        let described = sample(&mut libvirt).await;
        assert_eq!((described.collected, described.domains.len()), (false, 0));
        assert_eq!(described.described.iter().map(|d| d.domain.uuid).collect::<Vec<_>>(), [uuid]);
        assert_eq!(described.gone, [], "nothing was asked that could tell");
    });
}

#[test]
fn counting_goes_on_with_another_worker_when_one_is_given_up() {
    block_on(async {
        let (mut libvirt, _) = connected().await;
        libvirt.count(slow()).unwrap();
        assert_eq!(sample(&mut libvirt).await.duty, Duty::Count);
        for _ in 0..MOST_STUCK {
            libvirt.count(slow()).unwrap();
            libvirt.give_up_counting().unwrap();
        }
        // These are not stuck: their answers come, are not taken for the last one's, and make room.
        libvirt.count(slow()).unwrap();
        let answer = sample(&mut libvirt).await;
        assert_eq!((answer.duty, answer.domains.len()), (Duty::Count, 1));
        assert_eq!(libvirt.outstanding_since(Duty::Count), None);
    });
}

#[test]
fn stuck_workers_are_few() {
    let (_listener, path, uri) = stuck_daemon();
    block_on(async {
        let mut libvirt = Libvirt::start(&uri);
        for _ in 0..MOST_STUCK {
            libvirt.count(slow()).unwrap();
            libvirt.give_up_counting().unwrap();
        }
        assert_eq!(libvirt.give_up_counting(), Err(Busy));
    });
    std::fs::remove_file(path).unwrap();
}

#[test]
fn waiting_for_an_answer_can_be_cancelled() {
    block_on(async {
        let (mut libvirt, _) = connected().await;
        libvirt.watch(fast()).unwrap();
        drop(tokio::time::timeout(Duration::ZERO, libvirt.next()).await);
        // Either the answer came at once, or it is still to come; never is it lost.
        if libvirt.outstanding_since(Duty::Watch).is_some() {
            assert_eq!(sample(&mut libvirt).await.domains.len(), 1);
        }
        libvirt.watch(fast()).unwrap();
        assert_eq!(sample(&mut libvirt).await.domains.len(), 1);
    });
}

#[test]
fn no_daemon_is_said_once_with_cause_and_fix() {
    block_on(async {
        let mut libvirt = Libvirt::start("qemu+unix:///system?socket=/nonexistent/libvirt-sock");
        let Update::Lost { reason } = libvirt.next().await else { panic!() };
        assert!(reason.contains("does not run") && reason.contains("/nonexistent/libvirt-sock"), "{reason}");
        assert_eq!(libvirt.watch(fast()), Err(Busy));
        let again = tokio::time::timeout(Duration::from_millis(600), libvirt.next()).await;
        assert!(again.is_err(), "the second attempt fails for the same reason: {again:?}");
    });
}

#[test]
fn a_stuck_daemon_holds_up_nothing() {
    let (_listener, path, uri) = stuck_daemon();
    let started = Instant::now();
    block_on(async {
        let mut libvirt = Libvirt::start(&uri);
        assert!(tokio::time::timeout(Duration::from_millis(100), libvirt.next()).await.is_err());
        assert_eq!(libvirt.watch(fast()), Err(Busy));
    });
    let error = snapshot(&uri, Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, LibvirtError::Deadline { .. }), "{error}");
    assert!(error.to_string().contains("did not answer within 0.1 s"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn snapshot_reads_everything_once() {
    let (to, sample) = probe(TEST_DRIVER, Duration::from_secs(20)).unwrap();
    assert_eq!(to.hypervisor.as_deref(), Some("TEST"));
    assert_eq!((sample.domains.len(), sample.described.len()), (1, 1));
    assert_eq!((sample.duty, sample.collected), (Duty::Watch, true));
}

#[test]
fn snapshot_names_cause_and_fix() {
    for (uri, words) in [
        ("nope:///x", "unknown connection URI nope:///x"),
        ("qemu+unix:///system?socket=/nonexistent/s", "libvirt does not run behind"),
        ("test:///default\0", "holds a NUL byte"),
    ] {
        let error = snapshot(uri, Duration::from_secs(20)).unwrap_err().one_line();
        assert!(error.contains(words), "{error}");
    }
}
