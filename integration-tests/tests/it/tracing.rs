//! One trace through every process: the client's context arrives at the collector with a span per stage.

use std::collections::BTreeSet;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use serde_json::json;
use tandem_chassis::seam;
use tandem_integration_tests::{ProcessCluster, checkpoints};
use tokio::sync::mpsc;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::support::run;

struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.0.send(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[test]
fn a_trace_goes_through_router_prefill_and_decode_with_a_span_per_stage() {
    run(async {
        let (send, mut received) = mpsc::unbounded_channel();
        let listener = seam::listen_tcp("127.0.0.1:0").await.expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let server =
            tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(send)));
        seam::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));

        let model = checkpoints::named("qwen3");
        let arguments = [
            "--processes",
            "--fake",
            "--model",
            model.to_str().expect("a path"),
            "--otlp-endpoint",
            &endpoint,
        ];
        let cluster = ProcessCluster::start(&arguments).await;
        let parent = ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        let body = json!({ "model": "qwen3", "prompt": [1, 2, 3], "max_tokens": 8 });
        let answer = cluster.api.post_with("/v1/completions", parent, &body).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        // Every process sends what it has left when it ends.
        assert_eq!(cluster.interrupt().await, Some(0));

        let mut stages = BTreeSet::new();
        while let Ok(export) = received.try_recv() {
            let scopes = export.resource_spans.into_iter().flat_map(|resource| resource.scope_spans);
            for span in scopes.flat_map(|scope| scope.spans) {
                let trace: String = span.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
                if trace == "0af7651916cd43dd8448eb211c80319c" {
                    if span.name == "transfer" {
                        // How many bytes moved, for how long, and what of that was waited for after the seal.
                        let told: BTreeSet<&str> = span.attributes.iter().map(|it| it.key.as_str()).collect();
                        let wanted = ["bytes", "busy_us", "exposed_bytes", "exposed_us"];
                        assert!(wanted.iter().all(|key| told.contains(key)), "{told:?}");
                    }
                    stages.insert(span.name);
                }
            }
        }
        let wanted = ["decode", "prefill", "queue", "request", "transfer"];
        assert_eq!(stages.iter().map(String::as_str).collect::<Vec<_>>(), wanted);
    });
}
