package bench

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/e2e/harness/node"
)

// program is a server that pods run. It logs each request. Once fail was called, it answers healthPath with status 500, and
// servedPath as before.
type program struct {
	name    string
	command func(dir string) (*exec.Cmd, error)
	fail    func(*member) error
	tcpMark *mark // for the share of its TCP probes that are answered, in %
}

var programs = []program{
	{"Go", goServer, (*member).setStatus, atLeast(85)},
	{"nginx", nginx, (*member).removeHealthy, atLeast(85)},
	{"Python", pythonServer, (*member).removeHealthy, nil},
}

const (
	servedPath  = "/seen"   // answered with 200 even if unhealthy
	healthyFile = "healthy" // in the directory of a server that is healthy
)

func goServer(string) (*exec.Cmd, error) {
	return exec.Command(filepath.Join(machine.Bin, "app"), "-listen", strconv.Itoa(podPort)), nil
}

func nginx(dir string) (*exec.Cmd, error) {
	file := filepath.Join(dir, "nginx.conf")
	cmd := exec.Command("nginx", "-p", dir, "-c", file, "-e", "stderr", "-g", "daemon off; master_process off;")
	return cmd, os.WriteFile(file, fmt.Appendf(nil, `
pid %[1]s/nginx.pid;
events { worker_connections 64; }
http {
	access_log /dev/stdout;
	server {
		listen %[2]d;
		root %[1]s;
		location = %[3]s { try_files /%[4]s =500; }
		location / { return 200; }
	}
}
`, dir, podPort, healthPath, healthyFile), 0o644)
}

// Python's server is the one in its library, with the listen backlog of common servers (128 in aiohttp, 2,048 in uvicorn and
// gunicorn).
func pythonServer(dir string) (*exec.Cmd, error) {
	cmd := exec.Command("/usr/bin/python3", "-c", fmt.Sprintf(`
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        healthy = self.path != %q or os.path.exists(%q)
        self.send_response(200 if healthy else 500)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\n")

ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("", %d), Server).serve_forever()
`, healthPath, healthyFile, podPort))
	cmd.Dir = dir
	return cmd, nil
}

// member is a pod of a probed node.
type member struct {
	node.Probed
	program
	dir string
	cmd *exec.Cmd
}

func (m *member) address() string { return addrPort(m.Pod.IPv4, podPort) }

func (m *member) removeHealthy() error { return os.Remove(filepath.Join(m.dir, healthyFile)) }

func (m *member) setStatus() error {
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get("http://" + m.address() + "/set?status=500")
	if err != nil {
		return err
	}
	return response.Body.Close()
}

func (m *member) stop() error { return m.cmd.Process.Signal(unix.SIGSTOP) }

// requests returns how many requests for healthPath the server has logged.
func (m *member) requests(t testing.TB) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(text, []byte(healthPath))
}
