package agent

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

// BenchmarkDaemon measures the CPU time and memory of the daemon, with two HTTP probes per pod and second from real sockets, or without
// any (idle). Looks at attachments come on top (BenchmarkLook in daemon/internal/repair), because a daemon in a network namespace of its
// own does not repair them.
//
//	go test ./daemon/internal/agent -run - -bench Daemon -benchtime 20x
//
// Each iteration is a second.
func BenchmarkDaemon(b *testing.B) {
	bpftest.RequireRoot(b)
	program := filepath.Join(b.TempDir(), "probeletd")
	if out, err := exec.Command("go", "build", "-o", program, "../../cmd/probeletd").CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	for _, refresh := range []string{"false", "true"} {
		for _, pods := range []int{125, 250, 500} {
			b.Run(fmt.Sprintf("refresh=%s/pods=%d", refresh, pods), func(b *testing.B) { benchDaemon(b, program, pods, refresh, true) })
		}
	}
	b.Run("idle/pods=500", func(b *testing.B) { benchDaemon(b, program, 500, "false", false) })
}

func benchDaemon(b *testing.B, program string, pods int, refresh string, probes bool) {
	node := bpftest.NewNode(b)
	bpfDir, state := bpftest.BPFDir(b), filepath.Join(b.TempDir(), "state")
	d, err := datapath.Ensure(b.Context(), bpfDir)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() })
	var specs strings.Builder
	specs.WriteString("pods:\n")
	all := make([]*bpftest.Pod, pods)
	for i := range all {
		all[i] = benchPod(b, node, d, bpfDir, state, &specs)
	}
	file := filepath.Join(b.TempDir(), "specs.yaml")
	if err := os.WriteFile(file, []byte(specs.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	daemon := exec.Command(program, "run", "--specs", file, "--prober", "host", "--bpf-dir", bpfDir, "--state-dir", state,
		"--refresh", refresh)
	daemon.Stderr = os.Stderr
	bpftest.Do(b, node.NS, daemon.Start)
	b.Cleanup(func() {
		_ = daemon.Process.Signal(unix.SIGTERM)
		_ = daemon.Wait()
	})

	probed := make(chan struct{})
	var probers sync.WaitGroup
	var failed atomic.Int64
	for i, pod := range all {
		for p, path := range []string{"/ready", "/live"} {
			if !probes {
				continue
			}
			address := fmt.Sprintf("%s:8080", pod.IPv4)
			offset := time.Duration(2*i+p) * time.Second / time.Duration(2*pods)
			probers.Go(func() { failed.Add(probeEverySecond(node, address, path, offset, probed)) })
		}
	}
	time.Sleep(5 * time.Second) // until the daemon knows all pods
	before, counters := cpuTime(b, daemon.Process.Pid), countersOf(b, d)
	b.ResetTimer()
	for b.Loop() {
		time.Sleep(time.Second)
	}
	took := cpuTime(b, daemon.Process.Pid) - before
	b.ReportMetric(100*took.Seconds()/b.Elapsed().Seconds(), "%core")
	b.ReportMetric(rss(b, daemon.Process.Pid), "MiB")
	now := countersOf(b, d)
	if probes {
		answered := now["answered_http"] - counters["answered_http"]
		b.ReportMetric(100*float64(answered)/float64(answered+now["observed"]-counters["observed"]), "%answered")
	}
	b.ReportMetric(0, "ns/op")
	b.StopTimer()
	close(probed)
	probers.Wait()
	if failed.Load() > 0 {
		b.Errorf("%d probes failed", failed.Load())
	}
}

func benchPod(b *testing.B, node *bpftest.Node, d *datapath.Datapath, bpfDir, state string, specs *strings.Builder) *bpftest.Pod {
	pod := node.AddPod(b)
	listener := pod.Listen(b, 8080)
	go func() { _ = http.Serve(listener, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})) }()
	r := attach.Record{
		ContainerID: "of-" + pod.HostIfName, IfName: "eth0", IfIndex: pod.IfIndex, HostIfName: pod.HostIfName,
		PodIPs: []string{pod.IPv4.String()}, CreatedAt: time.Now(),
	}
	if err := attach.WriteRecord(state, r); err != nil {
		b.Fatal(err)
	}
	bpftest.Do(b, node.NS, func() error {
		return attach.Attach(d, bpfDir, r.ID(), attach.Target{IfIndex: pod.IfIndex, PodNetns: pod.Netns}, attach.ViaAuto)
	})
	const probe = "{httpGet: {path: /%s, port: 8080}, periodSeconds: 1}"
	fmt.Fprintf(specs, "- {name: %s, ips: [%s], containers: [{name: c, readinessProbe: "+probe+", livenessProbe: "+probe+"}]}\n",
		pod.HostIfName, pod.IPv4, "ready", "live")
	return pod
}

// probeEverySecond probes like a worker of the prober. It returns how many of its probes failed.
func probeEverySecond(node *bpftest.Node, address, path string, offset time.Duration, done <-chan struct{}) (failed int64) {
	time.Sleep(offset)
	every := time.NewTicker(time.Second)
	defer every.Stop()
	for {
		if probeOnce(node, address, path) != nil {
			failed++
		}
		select {
		case <-done:
			return failed
		case <-every.C:
		}
	}
}

func probeOnce(node *bpftest.Node, address, path string) error {
	var conn net.Conn
	err := node.NS.Do(func(ns.NetNS) (err error) {
		conn, err = net.DialTimeout("tcp", address, time.Second)
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // read to its end
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	request := "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"
	if _, err := fmt.Fprintf(conn, request, path, address); err != nil {
		return err
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err == nil {
		_, err = io.Copy(io.Discard, response.Body)
	}
	return err
}

func countersOf(b *testing.B, d *datapath.Datapath) map[string]uint64 {
	b.Helper()
	counters, err := d.Counters()
	if err != nil {
		b.Fatal(err)
	}
	return counters
}

// cpuTime returns the user and system time of a process (proc_pid_stat(5)).
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var ticks int
	for _, field := range fields[11:13] { // utime, stime
		n, err := strconv.Atoi(field)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100 // USER_HZ
}

// rss returns the resident memory of a process, in MiB.
func rss(b *testing.B, pid int) float64 {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	if err != nil {
		b.Fatal(err)
	}
	return float64(pages*os.Getpagesize()) / (1 << 20)
}
