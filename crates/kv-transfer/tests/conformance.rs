//! Every row of the table passes the suite, on one thread and on several.

use tandem_kv_transfer::{Options, Row, TRANSPORTS, conformance};

fn row(name: &str) -> &'static Row {
    TRANSPORTS.iter().find(|row| row.name == name).expect("a row")
}

#[tokio::test]
async fn inproc_holds_what_a_transport_must() {
    conformance::run(row("inproc"), &Options::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn inproc_holds_it_on_several_threads() {
    conformance::run(row("inproc"), &Options::default()).await;
}

#[tokio::test]
async fn shm_holds_what_a_transport_must() {
    conformance::run(row("shm"), &Options::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn shm_holds_it_on_several_threads() {
    conformance::run(row("shm"), &Options::default()).await;
}

#[tokio::test]
async fn tcp_holds_what_a_transport_must() {
    conformance::run(row("tcp"), &Options::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn tcp_holds_it_on_several_threads() {
    conformance::run(row("tcp"), &Options::default()).await;
}

#[test]
fn every_row_has_a_test_here() {
    let names: Vec<&str> = TRANSPORTS.iter().map(|row| row.name).collect();
    assert_eq!(names, ["inproc", "shm", "tcp"], "a new row of the table runs the suite in this file");
    for row in TRANSPORTS {
        assert_eq!((row.make)(&Options::default()).name(), row.name);
    }
}
