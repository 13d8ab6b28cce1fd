//! Owners that are killed and stopped as processes.

use tandem_kv_transfer::{Row, TRANSPORTS, conformance};
use tokio::process::Command;

const ROW: &str = "TANDEM_TEST_OWNER_OF";

fn row(name: &str) -> &'static Row {
    TRANSPORTS.iter().find(|row| row.name == name).expect("a row")
}

/// The tests below start this as the owner's process. For everybody else it has nothing to do.
#[tokio::test]
async fn this_program_is_an_owner_when_it_is_told_to_be_one() {
    if let Ok(name) = std::env::var(ROW) {
        conformance::owner(row(&name)).await;
    }
}

async fn check(name: &'static str) {
    let program = std::env::current_exe().expect("this program has a path");
    let command = || {
        let mut command = Command::new(&program);
        command
            .args(["this_program_is_an_owner_when_it_is_told_to_be_one", "--exact", "--nocapture"])
            .env(ROW, name);
        command
    };
    conformance::run_with_processes(row(name), command).await;
}

#[tokio::test]
async fn pulls_over_shm_outlive_their_owners() {
    check("shm").await;
}

#[tokio::test]
async fn pulls_over_tcp_outlive_their_owners() {
    check("tcp").await;
}

#[test]
fn every_row_that_reaches_other_processes_has_a_test_here() {
    let others: Vec<&str> = TRANSPORTS.iter().map(|row| row.name).filter(|&name| name != "inproc").collect();
    assert_eq!(others, ["shm", "tcp"], "`inproc` has no other process that could die");
}
