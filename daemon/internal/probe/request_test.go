package probe

import (
	"net/http"
	"reflect"
	"testing"
)

func TestParseRequest(t *testing.T) {
	const rest = " HTTP/1.1\r\nHost: 192.0.2.1:80\r\nUser-Agent: kube-probe/1.37\r\nX-A: 1\r\nx-a: 2\r\nConnection: close\r\n\r\n"
	header := http.Header{"User-Agent": {"kube-probe/1.37"}, "X-A": {"1", "2"}, "Connection": {"close"}}
	for name, test := range map[string]struct {
		text string
		path string // empty if an error is expected
	}{
		"plain":            {"GET /x" + rest, "/x"},
		"escaped, query":   {"GET /a%20b//?x=%2f" + rest, "/a%20b//?x=%2f"},
		"only a query":     {"GET /?" + rest, "/?"},
		"another method":   {"POST /x" + rest, ""},
		"HEAD":             {"HEAD /x" + rest, ""},
		"another version":  {"GET /x HTTP/1.0" + rest[len(" HTTP/1.1"):], ""},
		"cut":              {"GET /x" + rest[:len(rest)-2], ""},
		"not even started": {"", ""},
		"two":              {"GET /x" + rest + "GET /y" + rest, ""},
		"more":             {"GET /x" + rest + "\r\n\r\n", ""},
		"a body":           {"GET /x HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\n\r\n\r\n", ""},
		"a chunked body":   {"GET /x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n", ""},
		"not HTTP":         {"EHLO x\r\n\r\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseRequest([]byte(test.text))
			if (err != nil) != (test.path == "") {
				t.Fatalf("got %+v, %v", got, err)
			}
			if want := (Request{test.path, "192.0.2.1:80", header}); err == nil && !reflect.DeepEqual(got, want) {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}
