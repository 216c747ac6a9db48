package evidence

import (
	"strings"
	"testing"

	"github.com/probelet/probelet/daemon/internal/probe"
)

const ok = "HTTP/1.1 200 OK\r\n"

func TestJudge(t *testing.T) {
	body := strings.Repeat("0123456789", 1+maxBody/10)[:maxBody]
	const chunked = ok + "Transfer-Encoding: chunked\r\n\r\n"
	success, failed := verdict{event: probe.Answered, status: 200}, verdict{event: probe.Failed}
	waits := verdict{event: probe.NoAnswer}
	doubtful := func(why Doubt) verdict { return verdict{doubt: why} }
	for name, test := range map[string]struct {
		text string
		end  End
		want verdict // the event of a doubt does not matter
	}{
		"whole":                            {ok + "Content-Length: 2\r\n\r\nok", Open, success},
		"whole, closed":                    {ok + "Content-Length: 2\r\n\r\nok", Closed, success},
		"whole, reset":                     {ok + "Content-Length: 2\r\n\r\nok", Broken, success},
		"whole, more unseen":               {ok + "Content-Length: 2\r\n\r\nok", Unseen, success},
		"more than its length":             {ok + "Content-Length: 2\r\n\r\nok!", Closed, success},
		"HTTP/1.0":                         {"HTTP/1.0 200\n\n", Closed, success},
		"no content":                       {"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\n", Open, verdict{event: probe.Answered, status: 204}},
		"until closed":                     {ok + "\r\nok", Closed, success},
		"until closed, open":               {ok + "\r\nok", Open, waits},
		"until closed, reset":              {ok + "\r\nok", Broken, failed},
		"until closed, unseen":             {ok + "\r\nok", Unseen, doubtful(DoubtUnseen)},
		"same length twice":                {ok + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nok", Closed, success},
		"as long as is read":               {ok + "\r\n" + body, Open, success},
		"a byte less":                      {ok + "\r\n" + body[1:], Open, waits},
		"longer than is read":              {ok + "Content-Length: 100000\r\n\r\n" + body, Unseen, success},
		"long and cut":                     {ok + "Content-Length: 10239\r\n\r\n" + body[2:], Closed, failed},
		"interim":                          {"HTTP/1.1 103 X\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + ok + "Content-Length: 0\r\n\r\n", Open, success},
		"interim only":                     {"HTTP/1.1 103 X\r\n\r\n", Closed, failed},
		"five interim":                     {strings.Repeat("HTTP/1.1 103 X\r\n\r\n", 5) + ok + "Content-Length: 0\r\n\r\n", Open, success},
		"six interim":                      {strings.Repeat("HTTP/1.1 103 X\r\n\r\n", 6) + ok + "Content-Length: 0\r\n\r\n", Open, doubtful(DoubtTiming)},
		"switches":                         {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", Open, failed},
		"redirect":                         {"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 9\r\n\r\n", Closed, verdict{event: probe.Answered, status: 302}},
		"error, cut":                       {"HTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\n", Closed, verdict{event: probe.Answered, status: 503}},
		"error, headers cut":               {"HTTP/1.1 503 Busy\r\n", Closed, failed},
		"status 999":                       {"HTTP/1.1 999 ?\r\nContent-Length: 0\r\n\r\n", Open, verdict{event: probe.Answered, status: 999}},
		"status 099":                       {"HTTP/1.1 099 ?\r\nContent-Length: 0\r\n\r\n", Open, failed},
		"one of ours":                      {ok + "Content-Length: 0\r\nCache-Status: probelet; hit\r\n\r\n", Open, doubtful(DoubtOurs)},
		"of another cache":                 {ok + "Content-Length: 0\r\nCache-Status: squid; hit\r\n\r\n", Open, success},
		"nothing":                          {"", Open, waits},
		"closed":                           {"", Closed, failed},
		"nothing seen":                     {"", Unseen, doubtful(DoubtUnseen)},
		"status line only":                 {ok, Closed, failed},
		"status line, open":                {ok, Open, waits},
		"too short":                        {ok + "Content-Length: 100\r\n\r\nhello", Closed, failed},
		"contradicting lengths":            {ok + "Content-Length: 2\r\nContent-Length: 3\r\n\r\nok!", Closed, failed},
		"encoded twice":                    {ok + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", Closed, failed},
		"unknown coding":                   {ok + "Transfer-Encoding: identity\r\n\r\nok", Closed, failed},
		"no colon":                         {ok + "no colon\r\nContent-Length: 2\r\n\r\nok", Closed, failed},
		"status 2000":                      {"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok", Closed, failed},
		"not HTTP":                         {"SSH-2.0-x\r\n", Closed, failed},
		"chunks":                           {chunked + "2\r\nok\r\n0\r\n\r\n", Open, success},
		"chunks, open":                     {chunked + "2\r\nok\r\n0\r\n", Open, waits},
		"chunks, no end":                   {chunked + "2\r\nok\r\n0\r\n", Closed, failed},
		"chunk cut":                        {chunked + "5\r\nhel", Closed, failed},
		"chunk, bare LF":                   {chunked + "2\nok\r\n0\r\n\r\n", Closed, failed},
		"trailer":                          {chunked + "0\r\nX: y\r\n\r\n", Open, success},
		"long trailer":                     {chunked + "0\r\nX: " + strings.Repeat("y", readBuffer) + "\r\n\r\n", Open, doubtful(DoubtTiming)},
		"chunk as long as is read":         {chunked + "2800\r\n" + body + "\r\n0\r\n\r\n", Open, success},
		"chunk as long as is read, unseen": {chunked + "2800\r\n" + body + "X", Unseen, doubtful(DoubtUnseen)},
		"chunk as long as is read, open":   {chunked + "2800\r\n" + body, Open, doubtful(DoubtUnseen)},
		"chunk longer than is read":        {chunked + "2801\r\n" + body + "x", Open, success},
		"chunk as long as is read, flawed": {chunked + "2800\r\n" + body + "XX", Open, failed},
		// Whether the flaw is found depends on how much had arrived when the last byte was read.
		"a flaw behind a full buffer": {
			ok + "Transfer-Encoding: chunked\r\nX: " + strings.Repeat("x", 1974-len(chunked)-len("X: \r\n")) + "\r\n\r\n" +
				strings.Repeat("3e8\r\n"+body[:1000]+"\r\n", 10) + "f0\r\n" + body[:240] + "XX", Open, doubtful(DoubtTiming),
		},
	} {
		t.Run(name, func(t *testing.T) {
			event, status, doubt := Response{[]byte(test.text), test.end}.Judge()
			got := verdict{event, status, doubt}
			if got != test.want && (doubt == "" || doubt != test.want.doubt) {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func BenchmarkJudge(b *testing.B) {
	for name, text := range map[string]string{
		"length":  ok + "Content-Type: text/plain\r\nDate: Thu, 26 Nov 2026 12:00:00 GMT\r\nContent-Length: 2\r\n\r\nok",
		"chunked": ok + "Content-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, _, doubt := (Response{[]byte(text), Closed}).Judge(); doubt != "" {
					b.Fatal(doubt)
				}
			}
		})
	}
}
