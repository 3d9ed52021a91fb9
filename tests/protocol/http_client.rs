//! The HTTP-FLV client with servers that behave differently from ours.

use std::time::Duration;

use downpour::http::client::{FlvClient, FlvClientError, FlvUrl};
use downpour_media::flv::{FILE_HEADER, Tag, TagKind};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

#[tokio::test]
async fn client_reads_a_chunked_body() {
    let tags = tags();
    let mut flv = FILE_HEADER.to_vec();
    tags.iter().for_each(|tag| flv.extend_from_slice(tag.framed()));
    let mut answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for chunk in flv.chunks(7) {
        answer.extend_from_slice(format!("{:x};x=y\r\n", chunk.len()).as_bytes());
        answer.extend_from_slice(chunk);
        answer.extend_from_slice(b"\r\n");
    }
    answer.extend_from_slice(b"0\r\n\r\n");
    let mut client = FlvClient::connect(&serve(answer).await, IDLE).await.unwrap();
    for tag in tags {
        assert_eq!(client.next().await.unwrap(), Some(tag));
    }
    assert_eq!(client.next().await.unwrap(), None);
}

#[tokio::test]
async fn client_reports_a_close_inside_a_tag() {
    let tags = tags();
    let mut answer = b"HTTP/1.0 200 OK\r\n\r\n".to_vec();
    answer.extend_from_slice(&FILE_HEADER);
    answer.extend_from_slice(tags[0].framed());
    answer.extend_from_slice(&tags[1].framed()[..12]);
    let mut client = FlvClient::connect(&serve(answer).await, IDLE).await.unwrap();
    assert_eq!(client.next().await.unwrap().as_ref(), Some(&tags[0]));
    assert!(matches!(client.next().await, Err(FlvClientError::CutShort)));
}

#[tokio::test]
async fn client_reports_other_responses() {
    let refused = b"HTTP/1.1 404 Not Found\r\nContent-Length: 8\r\n\r\nnot\x07here".to_vec();
    let error = FlvClient::connect(&serve(refused).await, IDLE).await.unwrap_err();
    assert_eq!(error.to_string(), "the server answered 404 Not Found: nothere");

    let page = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>".to_vec();
    let mut client = FlvClient::connect(&serve(page).await, IDLE).await.unwrap();
    let error = client.next().await.unwrap_err();
    assert!(error.to_string().contains("not FLV"), "{error}");

    let garbage = b"RTSP/1.0 200 OK\r\n\r\n".to_vec();
    let error = FlvClient::connect(&serve(garbage).await, IDLE).await.unwrap_err();
    assert!(matches!(error, FlvClientError::Http(_)), "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url: FlvUrl = format!("http://{}/a/b.flv", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let error = FlvClient::connect(&url, IDLE).await.unwrap_err();
    assert!(matches!(error, FlvClientError::Connect(_)), "{error}");
}

#[tokio::test]
async fn client_closes_a_silent_server() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url: FlvUrl = format!("http://{}/a/b.flv", listener.local_addr().unwrap()).parse().unwrap();
    let server = tokio::spawn(async move {
        let mut socket = accept(&listener).await;
        socket.write_all(b"HTTP/1.1 200 OK\r\n\r\nFLV").await.unwrap();
        // Until the client closes.
        socket.read_to_end(&mut Vec::new()).await
    });
    let mut client = FlvClient::connect(&url, Duration::from_millis(50)).await.unwrap();
    assert!(matches!(client.next().await, Err(FlvClientError::Silent)));
    drop(client);
    let _ = tokio::time::timeout(IDLE, server).await.expect("the client has closed");
}

/// Answers one request with these bytes, and closes.
async fn serve(answer: Vec<u8>) -> FlvUrl {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/live/movie.flv?a=b", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut socket = accept(&listener).await;
        socket.write_all(&answer).await.unwrap();
        socket.shutdown().await.unwrap();
        let _ = socket.read_to_end(&mut Vec::new()).await;
    });
    url.parse().unwrap()
}

async fn accept(listener: &TcpListener) -> TcpStream {
    let (mut socket, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        request.push(socket.read_u8().await.unwrap());
    }
    let request = String::from_utf8(request).unwrap();
    assert!(request.starts_with("GET /"), "{request}");
    assert!(request.to_lowercase().contains("\r\nhost: 127.0.0.1:"), "{request}");
    socket
}

fn tags() -> Vec<Tag> {
    (0..5u8).map(|i| Tag::new(TagKind::Audio, u32::from(i) * 23, &[0xaf, 1, i]).unwrap()).collect()
}

const IDLE: Duration = Duration::from_secs(10);
