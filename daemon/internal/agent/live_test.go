package agent

import (
	"testing"

	"github.com/probelet/probelet/bpf/datapath"
)

// A TCP endpoint of a pod whose listening sockets can be inspected is answered longer, and described accordingly.
func TestLiveListener(t *testing.T) {
	n := newNode(t)
	if !n.d.SeesListeners() {
		t.Skip("this kernel does not let listening sockets be looked at")
	}
	listener := n.pod.Listen(t, 9090)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	n.specs("tcpSocket: {port: 9090}, periodSeconds: 1, timeoutSeconds: 1")
	n.attach()
	n.start()
	n.eventually("the probe's endpoint is known", n.has(datapath.TCPKey(9090)))
	connect := func() { _ = n.pod.Dial(t, n.pod.IPv4.String()+":9090").Close() }
	connect()
	n.eventually("fresh", n.open(9090))
	record := n.records()[datapath.TCPKey(9090)]
	if bound := record.FreshUntil - record.ObservedAt; bound != 10_500_000_000 {
		t.Errorf("answered for %d ns", bound)
	}
	n.eventually("the limit was reached", func() bool {
		connect()
		got, _ := n.metricsOf()
		return got[`probelet_probes_total{reason="real_due",verdict="passed"}`] != "0"
	})
	if e := n.endpoint(); e.Live != 9 || e.StalenessBound != 10.5 {
		t.Errorf("described as %+v", e)
	}
}
