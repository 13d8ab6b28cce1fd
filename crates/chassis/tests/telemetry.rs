//! Spans reach a collector over OTLP. A file of its own: telemetry is set up once per process.

use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use tandem_chassis::{seam, stages, telemetry};
use tokio::sync::mpsc;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

struct Collector(mpsc::Sender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.send(request.into_inner()).await.map_err(|_| Status::unavailable("the test has ended"))?;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test]
async fn a_stage_continues_the_trace_of_the_process_before() {
    let (send, mut received) = mpsc::channel(16);
    let listener = seam::listen_tcp("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(send)));
    let server = seam::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));

    let guard = telemetry::init("tandem-test", Some(&endpoint));
    let second = telemetry::init("another-component", Some("http://127.0.0.1:1"));
    drop(second);

    let span = tracing::info_span!(target: "tandem_test", "prefill", request = "r-1");
    assert_eq!(span.metadata().unwrap().name(), stages::PREFILL);
    telemetry::set_parent(&span, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let onward = span.in_scope(|| {
        tracing::debug_span!(target: "tandem_test", "too small to export").in_scope(|| {});
        tracing::info_span!(target: "h2", "not ours").in_scope(|| {});
        telemetry::traceparent_of_current().expect("the span is exported")
    });
    drop(span);
    let own = tracing::info_span!(target: "tandem_test", "transfer");
    telemetry::set_parent(&own, "nonsense");
    drop(own);

    // Dropping the guard sends what is left; it blocks, and this runtime has to serve the collector meanwhile.
    tokio::task::spawn_blocking(move || drop(guard)).await.unwrap();
    let mut resources = Vec::new();
    let mut spans = Vec::new();
    while spans.len() < 2 {
        let request = seam::timeout(Duration::from_secs(30), received.recv())
            .await
            .expect("both spans arrive")
            .unwrap();
        for resource in request.resource_spans {
            spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
            resources.extend(resource.resource);
        }
    }
    server.abort();

    let service = resources[0].attributes.iter().find(|attribute| attribute.key == "service.name").unwrap();
    let service = service.value.as_ref().unwrap().value.as_ref().unwrap();
    assert_eq!(service, &Value::StringValue("tandem-test".to_owned()));
    assert_eq!(spans.len(), 2);
    let prefill = spans.iter().find(|span| span.name == stages::PREFILL).unwrap();
    assert_eq!(hex(&prefill.trace_id), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(hex(&prefill.parent_span_id), "b7ad6b7169203331");
    assert_eq!(onward, format!("00-0af7651916cd43dd8448eb211c80319c-{}-01", hex(&prefill.span_id)));
    assert!(prefill.attributes.iter().any(|attribute| attribute.key == "request"));
    let transfer = spans.iter().find(|span| span.name == stages::TRANSFER).unwrap();
    assert!(transfer.parent_span_id.is_empty());
    assert_ne!(transfer.trace_id, prefill.trace_id);
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
