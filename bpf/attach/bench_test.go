package attach_test

import (
	"errors"
	"flag"
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

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
)

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

// BenchmarkKill kills a pod's server (kill -9) and reports for how long after the signal connections are still accepted in its
// name, as percentiles over b.N kills. The evidence is fresh for an hour, so only watch can end it.
func BenchmarkKill(b *testing.B) {
	node := bpftest.NewNode(b)
	pod := node.AddPod(b)
	s := serve(b, pod, ways[0])
	if err := s.listener.Close(); err != nil {
		b.Fatal(err)
	}
	address := fmt.Sprintf("%s:8080", pod.IPv4)
	var took []time.Duration
	for b.Loop() {
		server := startServer(b, pod, ":8080")
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

// startServer starts the test binary as a server in the pod and waits until it listens.
func startServer(t testing.TB, pod *bpftest.Pod, address string) *exec.Cmd {
	t.Helper()
	server := exec.Command("/proc/self/exe")
	server.Env = append(os.Environ(), serverEnv+"="+address)
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	ready, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	bpftest.Do(t, pod.NS, server.Start)
	t.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait() // killed
	})
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		t.Fatalf("the server in the pod: %v", err)
	}
	return server
}

const serverEnv = "PROBELET_TEST_SERVER"

func TestMain(m *testing.M) {
	for env, run := range map[string]func(addresses string) error{serverEnv: runServer, clientEnv: runClient, foreverEnv: runForever} {
		addresses := os.Getenv(env)
		if addresses == "" {
			continue
		}
		if err := run(addresses); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	// Defaults that the command line overrides: each check holds many conversations, and most tests wait for timers.
	for name, value := range map[string]string{"rapid.checks": "3", "test.parallel": "8"} {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	bpftest.RunInOwnCgroup(m.Run)
}

// runServer listens until it is killed.
func runServer(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		_ = conn.Close()
	}
}
