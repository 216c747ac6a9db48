package attach_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
)

// BenchmarkProbe asks the same pod in turn what is answered and what is passed on, and reports the medians, their ratio, and
// what the kernel itself counts of the two programs' run time. Only ratios carry over to other machines.
func BenchmarkProbe(b *testing.B) {
	node := bpftest.NewNode(b)
	pod := node.AddPod(b)
	s := serve(b, pod, attach.HookAuto)
	passed := pod.Listen(b, 9090) // nothing known of it
	go func() {
		for {
			conn, err := passed.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Read(make([]byte, 1024))
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			_ = conn.Close()
		}
	}()
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close() //nolint:errcheck // a benchmark's

	var took [2][]time.Duration
	bpftest.Do(b, node.NS, func() error { // once, for entering a namespace costs more than a probe
		for b.Loop() {
			for i, port := range []int{8080, 9090} {
				start := time.Now()
				reply, err := get(fmt.Sprintf("%s:%d", pod.IPv4, port))
				took[i] = append(took[i], time.Since(start))
				if err != nil || strings.Contains(reply, hit) != (i == 0) {
					return fmt.Errorf("port %d: %q, %w", port, reply, err)
				}
			}
		}
		return nil
	})
	answered, real := median(took[0]), median(took[1])
	b.ReportMetric(float64(answered.Nanoseconds()), "answered-ns")
	b.ReportMetric(float64(real.Nanoseconds()), "passed-ns")
	b.ReportMetric(float64(real)/float64(answered), "passed/answered")
	for name, p := range map[string]*ebpf.Program{"steer": s.d.Steer(), "respond": s.d.Respond()} {
		run, err := p.Stats()
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(run.Runtime.Nanoseconds())/float64(run.RunCount), name+"-ns/packet")
	}
}

func get(address string) (string, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck // a benchmark's
	if _, err := io.WriteString(conn, probe); err != nil {
		return "", err
	}
	reply, err := io.ReadAll(conn)
	return string(reply), err
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}

// BenchmarkKill kills a pod's server (kill -9) and reports how long, from the signal on, connections are still accepted in its
// name: percentiles over b.N kills. The evidence is good for an hour, so only watch can end it.
func BenchmarkKill(b *testing.B) {
	node := bpftest.NewNode(b)
	pod := node.AddPod(b)
	s := serve(b, pod, attach.HookAuto)
	if err := s.listener.Close(); err != nil {
		b.Fatal(err)
	}
	address := fmt.Sprintf("%s:8080", pod.IPv4)
	var took []time.Duration
	for b.Loop() {
		server := startServer(b, pod)
		s.arm(b)
		bpftest.Do(b, node.NS, func() error {
			if reply, err := get(address); err != nil || !strings.Contains(reply, hit) {
				return fmt.Errorf("before the kill: %q, %w", reply, err)
			}
			start := time.Now()
			if err := server.Process.Kill(); err != nil {
				return err
			}
			for {
				conn, err := net.Dial("tcp", address)
				if errors.Is(err, unix.ECONNREFUSED) {
					break
				}
				if err != nil {
					return err
				}
				_ = conn.Close()
			}
			took = append(took, time.Since(start))
			return nil
		})
		_ = server.Wait() // killed
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
	b.ReportMetric(float64(took[len(took)-1].Microseconds()), "max-µs")
}

// startServer starts this test's program as a server in the pod, and waits until it listens.
func startServer(b *testing.B, pod *bpftest.Pod) *exec.Cmd {
	b.Helper()
	server := exec.Command("/proc/self/exe")
	server.Env = append(os.Environ(), serverEnv+"=:8080")
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	ready, err := server.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	bpftest.Do(b, pod.NS, server.Start)
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		b.Fatalf("the server in the pod: %v", err)
	}
	return server
}

const serverEnv = "PROBELET_TEST_SERVER"

func TestMain(m *testing.M) {
	if address := os.Getenv(serverEnv); address != "" {
		if _, err := net.Listen("tcp", address); err != nil {
			panic(err)
		}
		fmt.Println("listening")
		select {} // until killed
	}
	os.Exit(m.Run())
}

// BenchmarkBulk reports the throughput of a stream out of the pod with the programs attached against without.
func BenchmarkBulk(b *testing.B) {
	const total = 256 << 20
	rate := func(attached bool, toPod bool) float64 {
		node := bpftest.NewNode(b)
		pod := node.AddPod(b)
		if attached {
			serve(b, pod, attach.HookAuto)
		}
		listener := pod.Listen(b, 5001)
		start := time.Now()
		done := make(chan error, 1)
		go func() {
			conn, err := listener.Accept()
			if err == nil {
				err = move(conn, !toPod, total)
			}
			done <- err
		}()
		conn := bpftest.Dial(b, node.NS, fmt.Sprintf("%s:5001", pod.IPv4))
		if err := move(conn, toPod, total); err != nil {
			b.Fatal(err)
		}
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		return total / time.Since(start).Seconds()
	}
	for _, direction := range []string{"from the pod", "to the pod"} {
		b.Run(direction, func(b *testing.B) {
			var ratios []float64
			for b.Loop() {
				with, without := rate(true, direction == "to the pod"), rate(false, direction == "to the pod")
				ratios = append(ratios, with/without)
			}
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "with/without")
		})
	}
}

// move writes or reads so many bytes.
func move(conn io.ReadWriteCloser, write bool, total int64) error {
	buf := make([]byte, 256<<10)
	if !write {
		n, err := io.Copy(io.Discard, conn)
		if err == nil && n != total {
			return fmt.Errorf("read %d bytes of %d", n, total)
		}
		return err
	}
	for sent := int64(0); sent < total; sent += int64(len(buf)) {
		if _, err := conn.Write(buf); err != nil {
			return err
		}
	}
	return conn.Close()
}
