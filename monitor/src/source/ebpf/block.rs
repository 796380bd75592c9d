//! Images that are watched: which, what the programs of `monitor-ebpf/src/block.rs` hang on meanwhile, and what they
//! counted.

use std::{mem::offset_of, sync::atomic::Ordering};

use aya::{
    Ebpf as Object,
    programs::{BtfTracePoint, ProgramError, tp_btf::BtfTracePointLinkId},
};
use monitor_ebpf::{
    ANY_PROCESS, BLOCK_DEVICE, BlockFilter, FLIGHTS, Flight, IMAGE_HISTOGRAMS, IMAGE_TABLE_ENTRIES,
    IMAGE_TABLE_PROBES, IMAGES, ImageEntry, ImageTable, PROCESS_FILTER_BITS, WANTED_BELOW, WANTED_DEVICES,
};

use super::{
    EbpfError,
    images::{Below, Counted, Hook, Image, ImageHistograms, ImageKey, Latencies, Plan},
    map,
    mapped::{Mapped, change_bit},
    probes::{Probe, ProbeState},
    program_error,
    sched::Places,
};

/// An image that is watched.
#[derive(Debug, PartialEq, Eq)]
pub struct ImageSlot {
    place: u32,
    histograms: Option<u32>,
    key: ImageKey,
    plan: Plan,
    /// Of the device below, where it is counted apart: place and place of the histograms.
    below: Option<(u32, Option<u32>)>,
}

impl ImageSlot {
    /// Which image.
    #[must_use]
    pub fn key(&self) -> ImageKey {
        self.key
    }

    /// How it is counted.
    #[must_use]
    pub fn plan(&self) -> Plan {
        self.plan
    }

    /// Whether the share of the host's device is counted.
    ///
    /// # Errors
    /// Why it is not.
    pub fn below(&self) -> Result<(), &'static str> {
        match self.plan.below {
            Below::NotAttributable(reason) => Err(reason),
            Below::Process | Below::Cached if self.below.is_none() => {
                Err("no room in the kernel tables for the device's share")
            }
            Below::Same | Below::Process | Below::Cached => Ok(()),
        }
    }
}

/// An image cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotWatched {
    /// The disk probes do not run.
    #[error("the disk probes do not run")]
    Off,
    /// No probe of this kernel sees its requests.
    #[error("no probe sees requests on an image that is opened like this")]
    Unseen,
    /// The kernel tables are full.
    #[error("no room in the kernel tables to watch another image ({0} are watched)")]
    Full(usize),
    /// The kernel refused to attach a program.
    #[error("the kernel refused to attach {program}: {reason}")]
    Attach {
        /// The program.
        program: &'static str,
        /// What the kernel said.
        reason: String,
    },
}

/// Words of an [`ImageEntry`].
const ENTRY_WORDS: usize = size_of::<ImageEntry>() / 8;

/// The maps of the disk programs, and what is handed out of them.
pub(super) struct Block {
    filter: Mapped<BlockFilter>,
    table: Mapped<ImageTable>,
    images: Mapped<Image>,
    histograms: Mapped<ImageHistograms>,
    flights: Mapped<Flight>,
    places: Places,
    histogram_places: Places,
    watched: Vec<ImageKey>,
    /// `WANTED_…` of each image that is watched.
    wanted: Vec<(u32, u64)>,
    /// By [`Hook`]: whether the kernel took its programs, how many images need it, and its links while it is attached.
    hooks: [HookState; Hook::ALL.len()],
}

#[derive(Default)]
struct HookState {
    loaded: bool,
    users: usize,
    links: Vec<(&'static str, BtfTracePointLinkId)>,
}

impl Block {
    /// Maps the maps; nothing is watched, nothing attached.
    pub(super) fn new(object: &Object, states: &[(Probe, ProbeState)]) -> Result<Self, EbpfError> {
        let loaded = |program: &str| {
            states.iter().any(|(probe, state)| probe.program == program && *state == ProbeState::Ready)
        };
        let hooks = Hook::ALL.map(|hook| HookState {
            loaded: hook.programs().iter().all(|p| loaded(p)),
            ..HookState::default()
        });
        Ok(Self {
            filter: map(object, "BLOCK_FILTER")?,
            table: map(object, "IMAGE_TABLE")?,
            images: map(object, "IMAGES")?,
            histograms: map(object, "IMAGE_HIST")?,
            flights: map(object, "FLIGHTS")?,
            places: Places::default(),
            histogram_places: Places::default(),
            watched: Vec::new(),
            wanted: Vec::new(),
            hooks,
        })
    }

    /// Whether the kernel has what a hook needs.
    pub(super) fn can(&self, hook: Hook) -> bool {
        self.hooks[hook as usize].loaded
    }

    /// Begins to watch an image; attaches what that needs.
    pub(super) fn watch(
        &mut self,
        object: &mut Object,
        key: ImageKey,
        plan: Plan,
    ) -> Result<ImageSlot, NotWatched> {
        if plan.hooks().next().is_none() {
            return Err(NotWatched::Unseen);
        }
        let full = NotWatched::Full(self.watched.len());
        let entry = self.free_entry(key).ok_or(full.clone())?;
        for hook in plan.hooks() {
            self.need(object, hook)?;
        }
        let Some(place) = self.places.take(IMAGES) else {
            plan.hooks().for_each(|hook| self.release(object, hook));
            return Err(full);
        };
        let histograms = self.take_histograms();
        let below = self.place_below(plan);
        let image = Image {
            counted_by: plan.counted_by(),
            histograms: histograms.map_or(0, |place| place + 1),
            below: below.map_or(0, |(place, _)| place + 1),
            device: key.device,
            ..Image::ZERO
        };
        self.images.set(place as usize, image);
        self.wanted.push((place, wanted(key, plan)));
        self.tell_wanted();
        self.enter(entry, key, place);
        if plan.hooks().any(|hook| hook == Hook::Bio) {
            self.enter_for_kernel(key, place);
        }
        Ok(ImageSlot { place, histograms, key, plan, below })
    }

    /// Room for what the device below is asked for, if it is to be counted apart and there is some.
    fn place_below(&mut self, plan: Plan) -> Option<(u32, Option<u32>)> {
        if !matches!(plan.below, Below::Process | Below::Cached) {
            return None;
        }
        let place = self.places.take(IMAGES)?;
        let histograms = self.take_histograms();
        let image = Image { histograms: histograms.map_or(0, |place| place + 1), ..Image::ZERO };
        self.images.set(place as usize, image);
        Some((place, histograms))
    }

    fn take_histograms(&mut self) -> Option<u32> {
        let place = self.histogram_places.take(IMAGE_HISTOGRAMS)?;
        self.histograms.set(place as usize, ImageHistograms::ZERO);
        Some(place)
    }

    /// Tells the programs what it is worth looking for.
    fn tell_wanted(&self) {
        let all = self.wanted.iter().fold(0, |all, (_, wanted)| all | wanted);
        self.filter.word(offset_of!(BlockFilter, wanted) / 8).store(all, Ordering::Release);
    }

    /// Lets the programs find an image.
    fn enter(&mut self, entry: usize, key: ImageKey, place: u32) {
        let word = |word| self.table.word(entry * ENTRY_WORDS + word);
        word(1).store(key.inode, Ordering::Relaxed);
        word(2).store(u64::from(key.tgid) << 32 | u64::from(key.device), Ordering::Release);
        word(0).store(u64::from(place) + 1, Ordering::Release);
        self.change_filter(key.tgid, true);
        self.watched.push(key);
    }

    /// Lets them find it from the kernel's threads too, which write back what is in the page cache and let go what a quota
    /// holds back: the first of several that have it open, as images that more than one writes to are beyond attribution.
    fn enter_for_kernel(&mut self, key: ImageKey, place: u32) {
        let key = ImageKey { tgid: ANY_PROCESS, ..key };
        if self.entry_of(key).is_none()
            && let Some(entry) = self.free_entry(key)
        {
            self.enter(entry, key, place);
        }
    }

    fn leave(&mut self, key: ImageKey) {
        if let Some(entry) = self.entry_of(key) {
            let word = |word| self.table.word(entry * ENTRY_WORDS + word);
            word(0).store(0, Ordering::Release);
            word(2).store(0, Ordering::Release);
            word(1).store(0, Ordering::Relaxed);
        }
        self.watched.retain(|watched| *watched != key);
        if !self.watched.iter().any(|w| w.tgid % PROCESS_FILTER_BITS == key.tgid % PROCESS_FILTER_BITS) {
            self.change_filter(key.tgid, false);
        }
    }

    fn change_filter(&self, tgid: u32, on: bool) {
        let bit = tgid % PROCESS_FILTER_BITS;
        change_bit(self.filter.word((bit / 64) as usize), bit % 64, on);
    }

    /// Stops watching an image: detaches what no other needs, and forgets its requests in flight. Returns what was
    /// counted in the end.
    pub(super) fn unwatch(&mut self, object: &mut Object, slot: ImageSlot) -> (Counted, Option<Latencies>) {
        self.leave(slot.key);
        let for_kernel = ImageKey { tgid: ANY_PROCESS, ..slot.key };
        if self.entry_of(for_kernel).is_some_and(|entry| self.place_of(entry) == slot.place) {
            self.leave(for_kernel);
        }
        self.wanted.retain(|(place, _)| *place != slot.place);
        self.tell_wanted();
        slot.plan.hooks().for_each(|hook| self.release(object, hook));
        let below = slot.below.map(|(place, _)| place);
        let mut counted = (self.image(&slot), self.latencies(&slot));
        if counted.0.image.in_flight() + counted.0.below.map_or(0, |below| below.in_flight()) > 0 {
            self.forget_flights(|place| place == slot.place || Some(place) == below);
        }
        counted.0.image.forget_in_flight();
        if self.watched.is_empty() {
            // Nothing is in flight any more: searches are short again, however many there once were.
            self.filter.word(offset_of!(BlockFilter, deepest) / 8).store(0, Ordering::Release);
        }
        self.places.give_back(slot.place);
        slot.histograms.into_iter().for_each(|place| self.histogram_places.give_back(place));
        if let Some((place, histograms)) = slot.below {
            self.places.give_back(place);
            histograms.into_iter().for_each(|place| self.histogram_places.give_back(place));
        }
        counted
    }

    /// What was counted for an image since it is watched.
    pub(super) fn image(&self, slot: &ImageSlot) -> Counted {
        let get = |place: u32| self.images.get(place as usize);
        Counted { image: get(slot.place), below: slot.below.map(|(place, _)| get(place)) }
    }

    /// Its latencies, if they are kept.
    pub(super) fn latencies(&self, slot: &ImageSlot) -> Option<Latencies> {
        let get = |place: u32| Box::new(self.histograms.get(place as usize));
        let below = slot.below.and_then(|(_, histograms)| histograms).map(get);
        Some(Latencies { image: get(slot.histograms?), below })
    }

    /// Attaches the programs of a hook unless they are.
    fn need(&mut self, object: &mut Object, hook: Hook) -> Result<(), NotWatched> {
        let state = &mut self.hooks[hook as usize];
        state.users += 1;
        if state.users > 1 {
            return Ok(());
        }
        for &program in hook.programs() {
            match tracepoint(object, program).and_then(|p| p.attach().map_err(|e| program_error(&e))) {
                Ok(link) => state.links.push((program, link)),
                Err(reason) => {
                    self.release(object, hook);
                    return Err(NotWatched::Attach { program, reason });
                }
            }
        }
        Ok(())
    }

    /// Detaches the programs of a hook unless another image needs them.
    fn release(&mut self, object: &mut Object, hook: Hook) {
        let state = &mut self.hooks[hook as usize];
        state.users = state.users.saturating_sub(1);
        if state.users > 0 {
            return;
        }
        // What begins requests first.
        for (program, link) in state.links.drain(..).rev() {
            let detached =
                tracepoint(object, program).and_then(|p| p.detach(link).map_err(|e| program_error(&e)));
            if let Err(reason) = detached {
                tracing::warn!(program, reason, "cannot be detached");
            }
        }
    }

    /// A request of an image that is no longer watched would never be taken out of the table.
    fn forget_flights(&mut self, of: impl Fn(u32) -> bool) {
        for at in 0..FLIGHTS as usize {
            let key = self.flights.word_of(at, offset_of!(Flight, key) / 8);
            if key.load(Ordering::Acquire) != 0 && of(u32::from(self.flights.get(at).slot)) {
                key.store(0, Ordering::Release);
            }
        }
    }

    fn entries(&self, key: ImageKey) -> impl Iterator<Item = usize> + use<> {
        let start = key.table_start();
        (0..IMAGE_TABLE_PROBES).map(move |i| (start + i) as usize % IMAGE_TABLE_ENTRIES)
    }

    fn free_entry(&self, key: ImageKey) -> Option<usize> {
        self.entries(key).find(|entry| self.key_of(*entry).is_none())
    }

    fn entry_of(&self, key: ImageKey) -> Option<usize> {
        self.entries(key).find(|entry| self.key_of(*entry) == Some(key))
    }

    /// The slot that an entry in use leads to.
    fn place_of(&self, entry: usize) -> u32 {
        let slot = self.table.word(entry * ENTRY_WORDS).load(Ordering::Acquire);
        u32::try_from(slot.saturating_sub(1)).unwrap_or(u32::MAX)
    }

    fn key_of(&self, entry: usize) -> Option<ImageKey> {
        let word = |word| self.table.word(entry * ENTRY_WORDS + word).load(Ordering::Acquire);
        #[expect(clippy::cast_possible_truncation, reason = "two halves of a word")]
        let key = ImageKey { inode: word(1), device: word(2) as u32, tgid: (word(2) >> 32) as u32 };
        (word(0) != 0).then_some(key)
    }
}

/// What the programs in the block layer have to look for, for the sake of an image.
fn wanted(key: ImageKey, plan: Plan) -> u64 {
    let in_block_layer = plan.hooks().any(|hook| hook == Hook::Bio);
    match key.inode {
        // A device that is read through the page cache is found by its pages, as files are.
        BLOCK_DEVICE if plan.below == Below::Same => WANTED_DEVICES,
        BLOCK_DEVICE => WANTED_DEVICES | WANTED_BELOW,
        _ if in_block_layer => WANTED_BELOW,
        _ => 0,
    }
}

fn tracepoint<'a>(object: &'a mut Object, program: &str) -> Result<&'a mut BtfTracePoint, String> {
    let program = object.program_mut(program).ok_or("not in the object")?;
    program.try_into().map_err(|e: ProgramError| program_error(&e))
}
