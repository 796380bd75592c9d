//! The program: parses the command line, sets up logs, calls the library, and turns errors into one line and an
//! exit status: 0 done, 1 a comparison exceeded its limit, 2 error.

use std::io::Write as _;

use anyhow::Context as _;
use clap::Parser as _;
use monitor::{
    check::check,
    cli::{Cli, Command, CompareArgs, CompareConfig, Config, RunArgs, SchemaFormat, Stream},
    equivalents,
    list::list,
    metric, record,
    recorded::{Feed, SharedFeed, compare_file, read_truths},
    run::{RunError, run, run_into},
    sink::{Ndjson, report},
};
use tokio::signal::unix::{SignalKind, signal};

/// Exit statuses; 1 is for a comparison that exceeded its limit.
const DONE: u8 = 0;
const EXCEEDED: u8 = 1;
const ERROR: u8 = 2;

fn main() {
    let cli = Cli::parse();
    set_up_logs(cli.verbose);
    let status = dispatch(cli.command).unwrap_or_else(|error| {
        tracing::error!("{}", monitor::one_line(error.as_ref()));
        ERROR
    });
    leave(status)
}

/// Ends the process here and now. The thread that talks to libvirt may be in the middle of it, and `exit` would run
/// the destructors of the libraries it uses under its feet: it crashed in OpenSSL now and then.
fn leave(status: u8) -> ! {
    // SAFETY: no requirement; what was written to the outputs has been flushed.
    unsafe { libc::_exit(status.into()) }
}

fn dispatch(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(args) => stream(args),
        Command::Compare(args) => compare(args),
        Command::List(args) => {
            let listing = list(&args)?;
            if let Some(error) = &listing.libvirt_error {
                tracing::warn!("{error}; listing what /proc shows");
            }
            print(&listing.text)
        }
        Command::Check(args) => {
            let report = check(&args);
            print(&report.text)?;
            Ok(if report.usable { DONE } else { ERROR })
        }
        Command::Schema(args) => match args.format {
            SchemaFormat::Json => print(&format!("{:#}\n", record::schema().to_value())),
            SchemaFormat::Markdown => print(&metric::markdown()),
            SchemaFormat::Equivalents => print(&equivalents::markdown()),
        },
    }
}

fn stream(args: RunArgs) -> anyhow::Result<u8> {
    let config = Config::resolve(args)?;
    until_signal(|shutdown| run(config, shutdown)).map(|()| DONE)
}

/// Runs something that a signal ends.
fn until_signal<F: Future<Output = Result<(), RunError>>>(
    work: impl FnOnce(Shutdown) -> F,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let result = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
        let (tell, told) = tokio::sync::oneshot::channel();
        // A task of its own, so that no tick has to ask three signals.
        tokio::spawn(async move {
            let signal = tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
                _ = hangup.recv() => "SIGHUP",
            };
            let _ = tell.send(signal); // Nobody waits for it any more.
        });
        let shutdown = async {
            match told.await {
                Ok(signal) => signal,
                Err(_) => std::future::pending().await,
            }
        };
        work(Box::pin(shutdown)).await.map_err(anyhow::Error::from)
    });
    // A libvirt call that never returns must not keep the process.
    runtime.shutdown_background();
    result
}

type Shutdown = std::pin::Pin<Box<dyn Future<Output = &'static str>>>;

fn compare(args: CompareArgs) -> anyhow::Result<u8> {
    let config = CompareConfig::resolve(args)?;
    let truths = config.truth.as_deref().map(read_truths).transpose()?.unwrap_or_default();
    let feed = Feed::new(truths, config.domains);
    let found = match config.stream {
        Stream::Recorded(file) => compare_file(&file, feed, config.limit_pct)?,
        Stream::Live(run) => {
            let shared = SharedFeed::new(feed);
            let sink = Ndjson::start("the comparison".to_owned(), shared.clone());
            until_signal(|shutdown| run_into(*run, sink, shutdown))?;
            shared.take().finish(config.limit_pct)
        }
    };
    let text = report::render(&found, config.format);
    if config.output == "-" {
        print(&text)?;
    } else {
        std::fs::write(&config.output, text).with_context(|| format!("cannot write {}", config.output))?;
    }
    if found.summary.compared == 0 {
        anyhow::bail!("nothing was compared: {}", found.nothing());
    }
    Ok(if found.summary.exceeded { EXCEEDED } else { DONE })
}

/// Writes to standard output; a closed pipe is success.
fn print(text: &str) -> anyhow::Result<u8> {
    let mut to = std::io::stdout();
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(DONE),
    }
}

/// Logs go to standard error; standard output is data only.
fn set_up_logs(verbose: u8) {
    let default = match verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("KVM_MONITOR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .without_time()
        .init();
}
