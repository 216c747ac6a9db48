package replies

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"time"
)

// Known lists replies that no prober judges a success, but that are easily mistaken for one.
var Known = func() []Reply {
	var all []Reply
	for _, text := range []string{
		"HTTP/1.1 200 OK\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello",
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nok",
		"HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 2\r\n\r\nok",
		"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("headers that never end ", 10),
	} {
		all = append(all, Reply{Parts: []Part{{Text: []byte(text)}}, End: Close})
	}
	return all
}()

// Healthy is the first seed whose replies are plain successes.
const Healthy = math.MaxUint64 - 1000

// Generate makes up a reply, always the same one for the same seed. The first seeds give those of Known.
func Generate(seed uint64) Reply {
	switch {
	case seed < uint64(len(Known)):
		return Known[seed]
	case seed >= Healthy:
		return Reply{Parts: []Part{{Text: []byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")}}, End: Close}
	}
	g := generator{rand.New(rand.NewPCG(seed, 0))}
	text := g.text()
	if g.oneIn(8) {
		text = g.mutate(text)
	}
	r := Reply{Parts: g.split(text), End: g.end(), Early: g.oneIn(50)}
	if g.oneIn(100) {
		r.Parts[g.IntN(len(r.Parts))].Pause = time.Duration(700+g.IntN(500)) * time.Millisecond
	}
	return r
}

type generator struct{ *rand.Rand }

func (g generator) oneIn(n int) bool { return g.IntN(n) == 0 }

// pick returns one of the choices; half of the time, the first.
func (g generator) pick(all ...string) string {
	if g.oneIn(2) {
		return all[0]
	}
	return all[g.IntN(len(all))]
}

// usually returns the usual text, and another one with a probability of 1/n.
func (g generator) usually(n int, usual string, others ...string) string {
	if !g.oneIn(n) {
		return usual
	}
	return others[g.IntN(len(others))]
}

func (g generator) text() []byte {
	var b bytes.Buffer
	b.WriteString(g.usually(50, "", "\r\n", "\n", " ", "\r\n\r\n"))
	if g.oneIn(12) {
		for range 1 + g.IntN(8) {
			fmt.Fprintf(&b, "HTTP/1.1 %s\r\n%s\r\n", g.pick("103 Early Hints", "100 Continue", "102 Processing", "199 ?", "101 Switching Protocols"),
				g.pick("", "Link: </style.css>\r\n", "Content-Length: 5\r\n", "no colon\r\n"))
		}
	}
	g.response(&b)
	if g.oneIn(15) {
		b.WriteString(g.pick("trailing", "\r\n", "HTTP/1.1 500 Oops\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
	}
	return b.Bytes()
}

func (g generator) response(b *bytes.Buffer) {
	eol := g.usually(40, "\r\n", "\n", "\r", "\r\r\n", "\n\r")
	b.WriteString(g.statusLine() + eol)
	framing, body := g.body()
	headers := append(framing, g.headers()...)
	g.Shuffle(len(headers), func(i, j int) { headers[i], headers[j] = headers[j], headers[i] })
	for _, h := range headers {
		b.WriteString(h + eol)
	}
	b.WriteString(g.usually(60, eol, "", " "+eol, "\r"))
	b.WriteString(body)
}

func (g generator) statusLine() string {
	proto := g.usually(15, "HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "HTTP/1", "HTTP/1.10", "http/1.1", "HTP/1.1", "HTTP/1.1\t", "")
	status := g.usually(4, "200", "204", "201", "206", "226", "299", "304", "302", "307", "400", "404", "500", "503", "599", "999")
	status = g.usually(25, status, "000", "099", "100", "101", "199", "2000", "20", "2", "", "abc", "-20", "+20", "0x2", "2 0", "٢٠٠")
	reason := g.usually(10, " OK", "", " ", " Not\tFound", " OK ", "  ", " \xff\x00")
	return proto + g.usually(40, " ", "  ", "\t", "") + status + reason
}

func (g generator) headers() []string {
	var all []string
	for range g.IntN(4) {
		all = append(all, g.pick("Server: generator", "Connection: close", "Connection: keep-alive", "Content-Type: text/plain",
			"Content-Encoding: gzip", "X-Empty:", "Set-Cookie: a=b", "Date: Thu, 26 Nov 2026 12:00:00 GMT", "Upgrade: h2c", "Location: /elsewhere",
			"Trailer: X-Sum", "Pragma: no-cache", "Connection: close, x", "Keep-Alive: timeout=5"))
	}
	if g.oneIn(12) {
		all = append(all, g.pick("no colon", " X: leading space", "X : space before the colon", ": no name", "X\x00: y", "X: \x00", "Ünicode: 1",
			"X: a\r\n folded", "X: a\r\n\tfolded", "X: a\rb", "Trailer: Content-Length", "(X): y", "X:\x7f", "\tX: y"))
	}
	if g.oneIn(100) {
		all = append(all, "Cache-Status: probelet; hit")
	}
	if g.oneIn(25) {
		size := []int{500, 4000, 4096, 5000, 8192, 15000, 20000, 70000}[g.IntN(8)]
		all = append(all, "X-Long: "+strings.Repeat("x", size))
	}
	if g.oneIn(60) {
		for i := range 50 << g.IntN(5) {
			all = append(all, fmt.Sprintf("X-%d: y", i))
		}
	}
	return all
}

var bodySizes = []int{0, 1, 2, 5, 100, 1000, 4095, 4096, 9000, 10238, 10239, 10240, 10241, 10242, 12000, 16000, 16384, 20000, 200000}

// body returns a body with the headers that announce its length.
func (g generator) body() (headers []string, body string) {
	size := g.IntN(40)
	if g.oneIn(4) {
		size = bodySizes[g.IntN(len(bodySizes))]
	}
	body = strings.Repeat("0123456789", size/10+1)[:size]
	switch g.IntN(5) {
	case 0:
		return nil, body
	case 1, 2:
		return g.lengths(size), body
	}
	return g.codings(size), g.chunks(body)
}

func (g generator) lengths(size int) []string {
	if !g.oneIn(5) {
		return []string{fmt.Sprintf("Content-Length: %d", size)}
	}
	header := []string{
		"Content-Length: %d\r\nContent-Length: %[1]d", "Content-Length: %d\r\nContent-Length: 3", "Content-Length: %d, %[1]d",
		"Content-Length: -%d", "Content-Length: +%d", "Content-Length: %dx", "Content-Length: %d ", "Content-Length:%d", "content-length: %d",
		"Content-Length: 0%d", "Content-Length: 0x%x", "Content-Length: %d.0", "Content-Length: ", "Content-Length: %d0",
		"Content-Length: 99999999999999999999%d", "Content-Length : %d", "Content-Length: %d\r\nTransfer-Encoding: chunked",
	}[g.IntN(17)]
	if strings.Contains(header, "%") {
		header = fmt.Sprintf(header, size+g.IntN(5)-2)
	}
	return []string{header}
}

func (g generator) codings(size int) []string {
	return []string{g.usually(6, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
		"Transfer-Encoding: identity", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: Chunked", "Transfer-Encoding: chunked ",
		"Transfer-Encoding: xchunked", "Transfer-Encoding:", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
		fmt.Sprintf("Transfer-Encoding: chunked\r\nContent-Length: %d", size), "Transfer-Encoding: chunked\r\nContent-Length: x",
		"Transfer-Encoding: \"chunked\"", "Transfer-Encoding: chunked\r\nTrailer: X-Sum", "Transfer-Encoding: chunked\r\nTrailer: Trailer")}
}

func (g generator) chunks(body string) string {
	var b strings.Builder
	most := 1 + g.IntN(1+len(body))
	if g.oneIn(3) {
		most = 10240
	}
	for len(body) > 0 {
		n := min(len(body), most)
		b.WriteString(g.size(n) + g.usually(200, "\r\n", "\n", "\r", "", "\r\r\n"))
		b.WriteString(body[:n] + g.usually(200, "\r\n", "", "\n", "XX", "\r", "x\r\n"))
		body = body[n:]
	}
	b.WriteString(g.usually(30, "0\r\n", "", "00\r\n", "0;x\r\n", "0 \r\n", "\r\n", "0", "0\n", "-0\r\n"))
	b.WriteString(g.usually(10, "", "X-Sum: 1\r\n", "no colon\r\n", "X-Sum: "+strings.Repeat("1", 3000)+"\r\n",
		"X-Sum: "+strings.Repeat("1", 5000)+"\r\n", "X-Other: 2\r\n"))
	b.WriteString(g.usually(30, "\r\n", "", "\n", "\r", "XX", "\r\n\r\n"))
	return b.String()
}

// size returns the line before a chunk, without its line ending.
func (g generator) size(n int) string {
	return fmt.Sprintf(g.usually(100, "%x", "%X", "0%x", "%x;a=b", "%x ", " %x", "%xg", "0x%x", "%x0", "-%x", "+%x", "1%x",
		"%x;"+strings.Repeat("e", 4090), "00000000000000000%x", "ffffffffffffffff%x", "%.0x"), n)
}

// mutate changes some of the bytes.
func (g generator) mutate(text []byte) []byte {
	text = bytes.Clone(text)
	for range 1 + g.IntN(3) {
		if len(text) == 0 {
			return text
		}
		at := g.IntN(min(len(text), 1+200<<g.IntN(8)))
		switch g.IntN(5) {
		case 0:
			text[at] ^= 1 << g.IntN(8)
		case 1:
			text = append(text[:at], text[min(len(text), at+1+g.IntN(3)):]...)
		case 2:
			text = append(text[:at:at], append([]byte{"\r\n :x0\x00"[g.IntN(7)]}, text[at:]...)...)
		case 3: // truncated
			text = text[:at]
		case 4: // repeated
			end := min(len(text), at+1+g.IntN(30))
			text = append(text[:end:end], append(bytes.Clone(text[at:end]), text[end:]...)...)
		}
	}
	return text
}

// split decides which bytes are written together.
func (g generator) split(text []byte) []Part {
	cuts := g.cuts(text)
	var parts []Part
	for _, n := range cuts {
		n = min(n, len(text))
		parts = append(parts, Part{g.pause(), text[:n]})
		text = text[n:]
	}
	return append(parts, Part{g.pause(), text})
}

// cuts returns the lengths of the parts.
func (g generator) cuts(text []byte) []int {
	switch g.IntN(10) {
	case 0: // anywhere
		var cuts []int
		for range 1 + g.IntN(6) {
			cuts = append(cuts, g.IntN(1+len(text)/2))
		}
		return cuts
	case 1: // one byte each
		cuts := make([]int, min(len(text), 150))
		for i := range cuts {
			cuts[i] = 1
		}
		return cuts
	case 2: // next to the end of a line
		if at := bytes.LastIndex(text[:g.IntN(1+len(text))], []byte("\r\n")); at >= 0 {
			return []int{at + g.IntN(4)}
		}
	case 3: // next to the end of the headers
		if at := bytes.Index(text, []byte("\r\n\r\n")); at >= 0 {
			return []int{at + g.IntN(6)}
		}
	case 4: // next to the last byte that the kubelet reads
		if at := bytes.Index(text, []byte("\r\n\r\n")); at >= 0 {
			return []int{at + 4 + 10240 + g.IntN(20) - 5}
		}
	case 5: // only the last byte
		return []int{max(0, len(text)-1-g.IntN(8))}
	}
	return nil
}

func (g generator) pause() time.Duration {
	if g.oneIn(3) {
		return time.Duration(g.IntN(5000)) * time.Microsecond
	}
	return 0
}

func (g generator) end() End {
	switch g.IntN(20) {
	case 0, 1:
		return HalfClose
	case 2:
		return Hold
	case 3, 4:
		return Reset
	}
	return Close
}
