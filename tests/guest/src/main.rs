//! PID 1 of a lab guest: runs an exact workload and prints what it did.
//!
//! The script ([`script`] describes the language) stands behind ` -- ` on the kernel command line. Every line on
//! the console is one JSON object: `start`, then `begin` and `step` for each step, then `end` (or `error`).
//! A `step` line holds what the step did and how the guest kernel's own counters moved meanwhile; the `end`
//! line holds the change over the whole script. Times are nanoseconds of the guest's clock since its boot.
//! Started as an ordinary program it takes the script as its arguments.
#![expect(clippy::print_stdout, reason = "the console is where the ground truth goes")]

mod boot;
mod clock;
mod counters;
mod json;
mod script;
mod steps;

use std::io::{self, Write};
use std::time::Duration;

use counters::Counters;
use json::Object;
use script::{End, Script, Step};

fn main() {
    let first = std::process::id() == 1;
    let text = if first { boot::start() } else { Ok(std::env::args().skip(1).collect::<Vec<_>>().join(" ")) };
    // What the steps kept must stay in use while the guest idles.
    let (end, _kept) = match text.and_then(|text| script::parse(&text)).and_then(|script| run(&script)) {
        Ok((end, kept)) => (end, Some(kept)),
        Err(error) => {
            print(&Object::new().text("lab", "error").text("error", &error));
            (End::PowerOff, None)
        }
    };
    if first {
        boot::end(end);
        loop {
            std::thread::sleep(Duration::from_secs(3600)); // PID 1 must not return.
        }
    }
}

fn run(script: &Script) -> Result<(End, steps::Kept), String> {
    let mut kept = steps::prepare(script).map_err(|e| format!("cannot listen: {e}"))?;
    let start = counters::read();
    print(&mark("start").raw("memory_kib", counters::memory_kib()).raw("devices", counters::devices(&start)));
    let mut number = 0u64;
    for _ in 0..script.times {
        for (word, step) in &script.steps {
            print(&mark("begin").raw("number", number).text("step", word));
            print(&run_step(number, word, step, &mut kept));
            number += 1;
        }
    }
    let end = counters::read();
    print(
        &mark("end")
            .raw("memory_kib", counters::memory_kib())
            .raw("devices", counters::devices(&end))
            .raw("kernel", counters::change(&start, &end)),
    );
    Ok((script.end, kept))
}

fn run_step(number: u64, word: &str, step: &Step, kept: &mut steps::Kept) -> Object {
    let (before, from_ns): (Counters, u64) = (counters::read(), clock::uptime_ns());
    let did = steps::run(step, kept).unwrap_or_else(|e| Object::new().text("error", &e.to_string()));
    let to_ns = clock::uptime_ns();
    mark("step")
        .raw("number", number)
        .text("step", word)
        .raw("from_ns", from_ns)
        .raw("to_ns", to_ns)
        .raw("did", did)
        .raw("kernel", counters::change(&before, &counters::read()))
}

fn mark(lab: &str) -> Object {
    Object::new().text("lab", lab).raw("at_ns", clock::uptime_ns())
}

fn print(object: &Object) {
    println!("{object}");
    // Nobody is left to hear about a console that does not work.
    let _ = io::stdout().flush();
}
