package evidence

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// maxBody is how much of a body the kubelet reads; a longer body is a success too (maxRespBodyLength in its
	// pkg/probe/http/http.go).
	maxBody = 10 << 10
	// readBuffer is http.Transport's buffer size, in bytes. It limits the length of trailers and of chunk headers.
	readBuffer = 4 << 10
	// maxInterim is how many interim responses net/http accepted before Go 1.24. Newer versions limit only their bytes.
	maxInterim = 5
)

// End says what follows the bytes of a response.
type End uint8

// Ends.
const (
	Open   End = iota // nothing more was seen before the client closed
	Closed            // the pod closed its side
	Broken            // the pod reset the connection; earlier bytes can still be read
	Unseen            // more bytes, which are unknown
)

// Response is what a pod sent on a connection until the client closed it, in order and from the first byte.
type Response struct {
	Bytes []byte
	End   End
}

type verdict struct {
	event  probe.Event
	status int
	doubt  Doubt
}

// Judge returns how the kubelet's HTTP prober judges the response to a GET request, apart from its timeout: Answered with
// the final status, NoAnswer or Failed. Like the prober it reads the body of a 2xx only. The doubt, if any, is
// DoubtUnseen, DoubtTiming or DoubtOurs.
func (r Response) Judge() (event probe.Event, status int, doubt Doubt) {
	buffered := pool.Get().(*bufio.Reader)
	defer pool.Put(buffered)
	v, chunked := r.read(buffered, false)
	if chunked {
		// net/http may also parse the end of the chunk, the next header or trailers, if they have arrived. Whether it finds
		// a flaw there depends on timing, so require a response that is a success either way. What was not seen of it is
		// missing.
		all, _ := r.read(bufio.NewReaderSize(nil, len(r.Bytes)+readBuffer), r.End == Open || r.End == Unseen)
		switch {
		case v.doubt != "" || v == all:
		case all.doubt == DoubtUnseen || all.event == probe.NoAnswer:
			v.doubt = DoubtUnseen
		default:
			v.doubt = DoubtTiming
		}
	}
	return v.event, v.status, v.doubt
}

var pool = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readBuffer) }}

// read reads the response as DoHTTPProbe does (pkg/probe/http/http.go), using http.Transport. If ahead, it also
// parses what follows the last byte that the prober reads of a chunked body, up to the next chunk's data.
func (r Response) read(buffered *bufio.Reader, ahead bool) (v verdict, chunked bool) {
	source := &source{Reader: bytes.NewReader(r.Bytes), end: r.End}
	buffered.Reset(source)
	response, err := readFinal(buffered)
	if err == nil && response.StatusCode/100 == 2 {
		_, err = io.Copy(io.Discard, io.LimitReader(response.Body, maxBody))
		chunked = response.TransferEncoding != nil
		if err == nil && chunked && ahead {
			// An empty read makes net/http check the end of the chunk and the next header (net/http/internal, chunked.go).
			if _, err = response.Body.Read(nil); errors.Is(err, io.EOF) {
				err = nil
			}
		}
	}
	switch {
	case source.starved && r.End != Open:
		return verdict{doubt: DoubtUnseen}, chunked
	case source.starved:
		return verdict{event: probe.NoAnswer}, chunked
	case err == errManyInterim:
		return verdict{doubt: DoubtTiming}, chunked
	case err != nil || response.StatusCode < 200:
		return verdict{event: probe.Failed}, chunked
	case isOurs(response.Header):
		return verdict{probe.Answered, response.StatusCode, DoubtOurs}, chunked
	}
	return verdict{event: probe.Answered, status: response.StatusCode}, chunked
}

var errManyInterim = errors.New("more interim responses than some versions of net/http accept")

// readFinal reads the first response that is not an interim one, as http.Transport does (readResponse).
func readFinal(r *bufio.Reader) (*http.Response, error) {
	for range maxInterim + 1 {
		response, err := http.ReadResponse(r, nil)
		if err != nil || response.StatusCode/100 != 1 || response.StatusCode == http.StatusSwitchingProtocols {
			return response, err
		}
	}
	return nil, errManyInterim
}

// isOurs reports whether the response is an answer of probelet's, and thus not evidence.
func isOurs(header http.Header) bool {
	return slices.ContainsFunc(header["Cache-Status"], func(value string) bool { return strings.HasPrefix(value, "probelet") })
}

// source is what a client could read.
type source struct {
	*bytes.Reader
	end     End
	starved bool // a client would wait for more, or would read unknown bytes
}

func (s *source) Read(p []byte) (int, error) {
	switch {
	case s.Len() > 0 || s.end == Closed:
		return s.Reader.Read(p)
	case s.end == Broken:
		return 0, syscall.ECONNRESET
	}
	s.starved = true
	return 0, io.ErrNoProgress
}
