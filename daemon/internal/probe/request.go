package probe

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/http"
)

// Question identifies the bytes of a request. Only the kernel side can compute it; the zero value means none.
type Question struct {
	Hash  uint64 `json:"hash,string"`
	Check uint64 `json:"check,string"`
}

// Request is a recorded HTTP request.
type Request struct {
	Path   string // path and query as in the request line
	Host   string
	Header http.Header // without Host
}

// ParseRequest parses a GET request. It returns an error for any other method or version, and for text that is not
// exactly one request without a body.
func ParseRequest(text []byte) (Request, error) {
	rest := bytes.NewReader(text)
	buffered := bufio.NewReaderSize(rest, len(text))
	request, err := http.ReadRequest(buffered)
	switch {
	case err != nil:
		return Request{}, err
	case request.Method != http.MethodGet || request.Proto != "HTTP/1.1":
		return Request{}, fmt.Errorf("%s %s: not a probe's request", request.Method, request.Proto)
	case request.ContentLength != 0 || request.TransferEncoding != nil:
		return Request{}, errors.New("the request has a body")
	case rest.Len()+buffered.Buffered() != 0:
		return Request{}, errors.New("more than one request")
	}
	return Request{Path: request.RequestURI, Host: request.Host, Header: request.Header}, nil
}
