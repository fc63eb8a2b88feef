//! The web server of the tests serves files as mirrors do, the good ones and those that die half-way.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use testkit::http::{Route, Server};

/// Status, head and body of one request, as far as they come.
fn get(server: &Server, path: &str, header: &str) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(("127.0.0.1", server.port())).expect("a server");
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: t\r\nAccept-Encoding: identity\r\n{header}\r\n");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("it answers");
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n");
    let body = answer.split_off(end.expect("a head") + 4);
    let head = String::from_utf8(answer).expect("a head is text");
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
    (status.expect("a status"), head, body)
}

/// The value of a header.
fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    lines.filter(|(n, _)| *n == name).map(|(_, v)| v).next()
}

#[test]
fn a_mirror_serves_the_rest_of_a_file_and_says_when_it_is_the_same() {
    let server = Server::start();
    server.put("/f", Route::Mirror(b"0123456789".to_vec()));
    let (status, head, body) = get(&server, "/f", "");
    assert_eq!((status, body.as_slice()), (200, b"0123456789".as_slice()));
    let tag = header(&head, "ETag").expect("a tag");
    let (status, head, body) = get(&server, "/f", "Range: bytes=7-\r\n");
    assert_eq!((status, body.as_slice()), (206, b"789".as_slice()));
    assert_eq!(header(&head, "Content-Range"), Some("bytes 7-9/10"));
    assert_eq!(header(&head, "Content-Length"), Some("3"));
    let (status, head, body) = get(&server, "/f", "range: bytes=10-\r\n");
    assert_eq!((status, body.len()), (416, 0));
    assert_eq!(header(&head, "Content-Range"), Some("bytes */10"));
    let (status, _, body) = get(&server, "/f", &format!("If-None-Match: {tag}\r\n"));
    assert_eq!((status, body.len()), (304, 0));
    let held = format!("Range: bytes=7-\r\nIf-Range: {tag}\r\n");
    assert_eq!(get(&server, "/f", &held).0, 206);
    server.put("/f", Route::Mirror(b"another".to_vec()));
    assert_eq!(get(&server, "/f", &held).0, 200, "a part of another file");
    let (status, _, body) = get(&server, "/f", &format!("If-None-Match: {tag}\r\n"));
    assert_eq!((status, body.as_slice()), (200, b"another".as_slice()));
    let asked = [None, Some(7), Some(10), None, Some(7), Some(7), None];
    assert_eq!(server.ranges("/f"), asked);
    assert_eq!((server.asked("/f"), server.unchanged("/f")), (7, 1));
}

#[test]
fn a_mirror_that_breaks_gives_the_file_piece_by_piece() {
    let server = Server::start();
    let file: Vec<u8> = (0..=255).collect();
    server.put("/f", Route::Breaking(file.clone(), 100));
    let mut held = Vec::new();
    while held.len() < file.len() {
        let range = format!("Range: bytes={}-\r\n", held.len());
        let (status, head, part) = get(&server, "/f", &range);
        let announced = (file.len() - held.len()).to_string();
        assert_eq!(header(&head, "Content-Length"), Some(announced.as_str()));
        assert_eq!(
            (status, part.len()),
            (206, 100.min(file.len() - held.len()))
        );
        held.extend(part);
    }
    assert_eq!(held, file);
    assert_eq!(server.ranges("/f"), [Some(0), Some(100), Some(200)]);
    let (status, _, part) = get(&server, "/f", "");
    assert_eq!((status, part.len()), (200, 100));
}
