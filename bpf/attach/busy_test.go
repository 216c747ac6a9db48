package attach_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// BenchmarkBusyServer probes a server (TCP, b.N times, 20 ms apart) that 64 clients in its pod keep busy, each request on a new
// connection, and reports the percentage of probes that each obstacle kept from being answered. It measures a Go server, and with
// PROBELET_TEST_NGINX=PATH also nginx with one worker.
func BenchmarkBusyServer(b *testing.B) {
	servers := map[string]func(b *testing.B, pod *bpftest.Pod){"go": func(b *testing.B, pod *bpftest.Pod) {
		l := pod.Listen(b, knockPort)
		go func() { _ = http.Serve(l, http.NotFoundHandler()) }()
	}}
	if nginx := os.Getenv("PROBELET_TEST_NGINX"); nginx != "" {
		servers["nginx"] = func(b *testing.B, pod *bpftest.Pod) { startNginx(b, pod, nginx) }
	}
	for name, start := range servers {
		b.Run(name, func(b *testing.B) {
			pod := bpftest.NewNode(b).AddPod(b)
			s := serve(b, pod, ways[0])
			start(b, pod)
			served := load(b, pod, 64)
			to := netip.AddrPortFrom(pod.IPv4, knockPort)
			polltest.Eventually(b, "the server accepts connections", func() bool { return connects(b, pod.Node, to) })
			s.armTCP(b, knockPort)
			before, from, start := s.counters(b), served.Load(), time.Now()
			for b.Loop() {
				if !connects(b, pod.Node, to) {
					b.Error("a probe failed")
				}
				time.Sleep(20 * time.Millisecond)
			}
			b.ReportMetric(float64(served.Load()-from)/time.Since(start).Seconds(), "requests/s")
			b.ReportMetric(100*float64(s.counters(b)["answered_tcp"]-before["answered_tcp"])/float64(b.N), "answered-%")
			for _, obstacle := range datapath.Obstacles {
				n := s.counters(b)["passed_"+obstacle] - before["passed_"+obstacle]
				b.ReportMetric(100*float64(n)/float64(b.N), obstacle+"-%")
			}
		})
	}
}

// load makes clients in the pod send requests, one per connection, and counts the replies.
func load(b *testing.B, pod *bpftest.Pod, clients int) *atomic.Int64 {
	b.Helper()
	var served atomic.Int64
	var wg sync.WaitGroup
	end := make(chan struct{})
	b.Cleanup(func() {
		close(end)
		wg.Wait()
	})
	for range clients {
		wg.Go(func() {
			_ = inNS(pod.NS, func() error {
				for {
					select {
					case <-end:
						return nil
					default:
					}
					conn, err := net.Dial("tcp", netip.AddrPortFrom(pod.IPv4, knockPort).String())
					if err != nil {
						time.Sleep(time.Millisecond)
						continue
					}
					_, _ = io.WriteString(conn, probe)
					if _, err := io.Copy(io.Discard, conn); err == nil {
						served.Add(1)
					}
					_ = conn.Close()
				}
			})
		})
	}
	return &served
}

func startNginx(b *testing.B, pod *bpftest.Pod, path string) {
	b.Helper()
	config := b.TempDir() + "/nginx.conf"
	text := fmt.Sprintf("daemon off; worker_processes 1; pid %s.pid; error_log /dev/null; events { worker_connections 1024; }\n"+
		"http { access_log off; server { listen %d; location / { return 404; } }\n", config, knockPort)
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		text += fmt.Sprintf("%s_temp_path %s.%s;\n", kind, config, kind)
	}
	text += "}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	nginx := exec.Command(path, "-c", config)
	nginx.Stderr, nginx.SysProcAttr = os.Stderr, &syscall.SysProcAttr{Pdeathsig: unix.SIGTERM}
	bpftest.Do(b, pod.NS, nginx.Start)
	b.Cleanup(func() {
		_ = nginx.Process.Signal(unix.SIGTERM)
		_ = nginx.Wait()
	})
}
