//! Reads a `sample` line into a table, without a copy of what it does not need.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::LineError;
use crate::{
    metric::Scope,
    units::{DomainUuid, MonotonicNs, SourceKind, Window},
};

/// Values of one metric, by source.
pub type Slots = [Option<u64>; SourceKind::COUNT];

/// A `sample` line.
#[derive(Clone, Debug, Default)]
pub struct SampleLine {
    /// Number of the sample among the domain's.
    pub seq: u64,
    /// Wall clock, RFC 3339; empty if absent.
    pub ts: String,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub mono_ns: u64,
    /// Time since the tick before, nanoseconds.
    pub interval_ns: u64,
    /// Which domain.
    pub uuid: Option<DomainUuid>,
    /// Its name.
    pub name: String,
    /// Counters are comparable within one epoch.
    pub epoch: u32,
    /// When each source was read.
    pub windows: [Option<Window>; SourceKind::COUNT],
    /// `cpu`.
    pub cpu: Row,
    /// `memory`.
    pub memory: Row,
    /// `vcpus`.
    pub vcpus: Rows,
    /// `interfaces`.
    pub interfaces: Rows,
    /// `disks`.
    pub disks: Rows,
}

/// The entities of one scope; buffers are kept from line to line.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    rows: Vec<EntityRow>,
    used: usize,
}

/// One vCPU, interface or disk.
#[derive(Clone, Debug, Default)]
pub struct EntityRow {
    /// Number of the vCPU, device or target.
    pub name: String,
    /// Its values.
    pub row: Row,
}

/// What a sample says of one entity.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// By position of the metric in its scope, and source.
    pub values: Vec<Slots>,
    /// What a vCPU did when it was read: `running`, `waiting`, ….
    pub state: String,
    /// Histograms by name: `[from, to, count]`.
    pub histograms: Vec<(String, Vec<[u64; 3]>)>,
    /// Who had the CPU while the vCPU waited.
    pub culprits: Vec<Culprit>,
    /// Age of the guest's report of its memory, seconds.
    pub age_s: Option<u64>,
    /// It is too old.
    pub stale: Option<bool>,
}

/// An element of `preempted_by`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub struct Culprit {
    /// Name.
    pub who: String,
    /// What it is.
    #[serde(default)]
    pub kind: String,
    /// Time it had the CPU, nanoseconds.
    pub ns: u64,
}

impl Rows {
    /// What the line has.
    #[must_use]
    pub fn get(&self) -> &[EntityRow] {
        &self.rows[..self.used]
    }

    fn add(&mut self) -> &mut EntityRow {
        if self.used == self.rows.len() {
            self.rows.push(EntityRow::default());
        }
        self.used += 1;
        let entity = &mut self.rows[self.used - 1];
        entity.name.clear();
        entity
    }
}

impl Row {
    fn clear(&mut self, scope: Scope) {
        self.values.clear();
        self.values.resize(scope.metrics().len(), [None; SourceKind::COUNT]);
        self.state.clear();
        self.histograms.clear();
        self.culprits.clear();
        self.age_s = None;
        self.stale = None;
    }
}

impl SampleLine {
    /// Reads a line.
    ///
    /// # Errors
    /// If it is no sample.
    pub fn read(&mut self, line: &[u8]) -> Result<(), LineError> {
        self.clear();
        let mut json = serde_json::Deserializer::from_slice(line);
        json.deserialize_map(Whole(self))?;
        json.end()?;
        if self.uuid.is_none() || self.mono_ns == 0 {
            return Err(LineError::Shape("a sample without `domain.uuid` or `mono_ns`".to_owned()));
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.ts.clear();
        self.name.clear();
        (self.seq, self.mono_ns, self.interval_ns, self.epoch) = (0, 0, 0, 0);
        self.uuid = None;
        self.windows = [None; SourceKind::COUNT];
        self.cpu.clear(Scope::Cpu);
        self.memory.clear(Scope::Memory);
        for rows in [&mut self.vcpus, &mut self.interfaces, &mut self.disks] {
            rows.used = 0;
        }
    }
}

struct Whole<'a>(&'a mut SampleLine);

impl<'de> Visitor<'de> for Whole<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a sample")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let to = self.0;
        while let Some(key) = map.next_key::<Key<'de>>()? {
            match key.0 {
                "seq" => to.seq = map.next_value()?,
                "ts" => to.ts.push_str(map.next_value::<Text<'de>>()?.0.as_ref()),
                "mono_ns" => to.mono_ns = map.next_value()?,
                "interval_ns" => to.interval_ns = map.next_value()?,
                "epoch" => to.epoch = map.next_value()?,
                "domain" => map.next_value_seed(Domain(to))?,
                "windows" => map.next_value_seed(Windows(&mut to.windows))?,
                "cpu" => map.next_value_seed(Object::of(Scope::Cpu, &mut to.cpu))?,
                "memory" => map.next_value_seed(Object::of(Scope::Memory, &mut to.memory))?,
                "vcpus" => map.next_value_seed(List(Scope::Vcpu, &mut to.vcpus))?,
                "interfaces" => map.next_value_seed(List(Scope::Interface, &mut to.interfaces))?,
                "disks" => map.next_value_seed(List(Scope::Disk, &mut to.disks))?,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// A key. Ours need no escapes, so that one with escapes is none that we know.
struct Key<'de>(&'de str);

impl<'de> de::Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Of;
        impl<'de> Visitor<'de> for Of {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(text))
            }
            fn visit_str<E: de::Error>(self, _: &str) -> Result<Key<'de>, E> {
                Ok(Key(""))
            }
        }
        from.deserialize_str(Of)
    }
}

/// Text, copied only if it has escapes.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] std::borrow::Cow<'a, str>);

macro_rules! seed {
    ($name:ident, $method:ident) => {
        impl<'de> DeserializeSeed<'de> for $name<'_> {
            type Value = ();
            fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
                from.$method(self)
            }
        }
    };
}

struct Domain<'a>(&'a mut SampleLine);
seed!(Domain, deserialize_map);

impl<'de> Visitor<'de> for Domain<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("uuid and name of a domain")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Key<'de>>()? {
            match key.0 {
                "uuid" => {
                    let text: Text<'de> = map.next_value()?;
                    self.0.uuid = Some(text.0.parse().map_err(de::Error::custom)?);
                }
                "name" => self.0.name.push_str(map.next_value::<Text<'de>>()?.0.as_ref()),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

fn source(name: &str) -> Option<SourceKind> {
    SourceKind::ALL.into_iter().find(|s| s.name() == name)
}

struct Windows<'a>(&'a mut [Option<Window>; SourceKind::COUNT]);
seed!(Windows, deserialize_map);

impl<'de> Visitor<'de> for Windows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("windows by source")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Key<'de>>()? {
            match source(key.0) {
                Some(source) => {
                    let [begin, end]: [u64; 2] = map.next_value()?;
                    if end < begin {
                        return Err(de::Error::custom("a window that ends before it begins"));
                    }
                    let window = Window { begin: MonotonicNs(begin), end: MonotonicNs(end) };
                    self.0[source as usize] = Some(window);
                }
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

struct List<'a>(Scope, &'a mut Rows);
seed!(List, deserialize_seq);

impl<'de> Visitor<'de> for List<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entities")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        loop {
            let EntityRow { name, row } = self.1.add();
            row.clear(self.0);
            if seq.next_element_seed(Object { scope: self.0, row, name: Some(name) })?.is_none() {
                self.1.used -= 1;
                return Ok(());
            }
        }
    }
}

struct Object<'a> {
    scope: Scope,
    row: &'a mut Row,
    name: Option<&'a mut String>,
}
seed!(Object, deserialize_map);

impl<'a> Object<'a> {
    fn of(scope: Scope, row: &'a mut Row) -> Self {
        Self { scope, row, name: None }
    }
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("metrics by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (defs, Self { row, name, .. }) = (self.scope.metrics(), self);
        let mut next = 0;
        let mut name = name;
        while let Some(key) = map.next_key::<Key<'de>>()? {
            // Keys come in the order of the table, some left out: look from the last one on first.
            let found = (next..defs.len()).chain(0..next).find(|i| defs[*i].name == key.0);
            if let Some(index) = found {
                next = index + 1;
                map.next_value_seed(Numbers(&mut row.values[index]))?;
                continue;
            }
            match (key.0, &mut name) {
                ("vcpu", Some(name)) => name.push_str(itoa(map.next_value()?, &mut [0; 20])),
                ("device" | "target", Some(name)) => {
                    name.push_str(map.next_value::<Text<'de>>()?.0.as_ref());
                }
                ("state", _) => row.state.push_str(map.next_value::<Text<'de>>()?.0.as_ref()),
                ("preempted_by", _) => row.culprits = map.next_value()?,
                ("age_s", _) => row.age_s = Some(map.next_value()?),
                ("stale", _) => row.stale = Some(map.next_value()?),
                (histogram, _) if histogram.ends_with("_hist_ns") => {
                    let histogram = histogram.to_owned();
                    row.histograms.push((histogram, map.next_value()?));
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

struct Numbers<'a>(&'a mut Slots);
seed!(Numbers, deserialize_map);

impl<'de> Visitor<'de> for Numbers<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number per source")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Key<'de>>()? {
            match source(key.0) {
                Some(source) => self.0[source as usize] = Some(map.next_value()?),
                None => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// The digits of a number.
fn itoa(mut number: u64, digits: &mut [u8; 20]) -> &str {
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
        if number == 0 {
            return std::str::from_utf8(&digits[at..]).unwrap_or("?");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metric::Metric;

    #[test]
    fn the_golden_samples_are_read() {
        let mut sample = SampleLine::default();
        for text in [
            include_str!("../../../../tests/golden/sample_all_sources.ndjson"),
            include_str!("../../../../tests/golden/sample_vcpu.ndjson"),
            include_str!("../../../../tests/golden/sample_memory.ndjson"),
        ] {
            for line in text.lines().filter(|l| !l.is_empty()) {
                sample.read(line.as_bytes()).unwrap();
                let value: serde_json::Value = serde_json::from_str(line).unwrap();
                assert_eq!(sample.seq, value["seq"]);
                assert_eq!(sample.vcpus.get().len(), value["vcpus"].as_array().unwrap().len());
                for (vcpu, expected) in sample.vcpus.get().iter().zip(value["vcpus"].as_array().unwrap()) {
                    assert_eq!(vcpu.name, expected["vcpu"].to_string());
                    for def in Scope::Vcpu.metrics() {
                        for source in SourceKind::ALL {
                            let found = vcpu.row.values[def.metric.index_in_scope()][source as usize];
                            assert_eq!(found, expected[def.name][source.name()].as_u64(), "{}", def.name);
                        }
                    }
                }
                let age = sample.memory.age_s;
                assert_eq!(age, value["memory"]["age_s"].as_u64());
            }
        }
    }

    #[test]
    fn a_line_leaves_nothing_of_the_line_before() {
        let head =
            r#"{"type":"sample","mono_ns":5,"domain":{"uuid":"4d5e0e2b-3c1f-4a7b-9d8e-0123456789ab"},"#;
        let mut sample = SampleLine::default();
        let full = format!(
            r#"{head}"vcpus":[{{"vcpu":12,"state":"running","run_ns":{{"ebpf":7}},"wait_hist_ns":[[0,1,2]]}},{{"vcpu":3}}]}}"#
        );
        sample.read(full.as_bytes()).unwrap();
        let vcpu = &sample.vcpus.get()[0];
        let run = vcpu.row.values[Metric::VcpuRun.index_in_scope()];
        assert_eq!((vcpu.name.as_str(), run[0], vcpu.row.state.as_str()), ("12", Some(7), "running"));
        assert_eq!(vcpu.row.histograms, [("wait_hist_ns".to_owned(), vec![[0, 1, 2]])]);
        sample.read(format!(r#"{head}"vcpus":[{{"vcpu":0}}]}}"#).as_bytes()).unwrap();
        let vcpu = &sample.vcpus.get()[0];
        assert_eq!((sample.vcpus.get().len(), vcpu.row.state.as_str()), (1, ""));
        assert!(vcpu.row.histograms.is_empty() && vcpu.row.values.iter().flatten().all(Option::is_none));
    }
}
