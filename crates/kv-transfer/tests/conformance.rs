//! Every row of the table passes the suite.

use tandem_kv_transfer::{TRANSPORTS, conformance};

fn row(name: &str) -> &'static tandem_kv_transfer::Row {
    TRANSPORTS.iter().find(|row| row.name == name).expect("a row")
}

#[tokio::test]
async fn inproc_holds_what_a_transport_must() {
    conformance::run(row("inproc")).await;
}

#[tokio::test]
async fn tcp_holds_what_a_transport_must() {
    conformance::run(row("tcp")).await;
}
