package attach_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/internal/polltest"
)

// halfClose sends a request, closes its sending side, and returns what comes back.
func halfClose(to netip.AddrPort, request string) (reply string, err error) {
	conn, err := dialFrom(netip.AddrPort{}, to)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck // a test's
	if request != "" {
		_, err = io.WriteString(conn, request)
	}
	if err := errors.Join(err, conn.CloseWrite()); err != nil {
		return "", err
	}
	all, err := io.ReadAll(conn)
	return string(all), err
}

// A client may close its sending side before it reads. It gets the whole reply, whether from the kernel or the pod.
func TestHalfClose(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		s.serveEchoOn(t, echoPort)
		bpftest.Do(t, s.Node.NS, func() error {
			for range 50 {
				reply, err := halfClose(netip.AddrPortFrom(addr, 8080), probe)
				if err != nil || !strings.Contains(reply, hit) {
					return fmt.Errorf("answered: %q, %w", reply, err)
				}
				reply, err = halfClose(netip.AddrPortFrom(addr, 8080), unknown)
				if err != nil || !strings.HasSuffix(reply, "GET /x 0") {
					return fmt.Errorf("handed over: %q, %w", reply, err)
				}
				text := strings.Repeat("hello", 20_000)
				if reply, err = halfClose(netip.AddrPortFrom(addr, echoPort), text); err != nil || reply != text {
					return fmt.Errorf("echoed: %d bytes, %w", len(reply), err)
				}
			}
			return nil
		})
		s.wantNothingLeft(t)
	})
}

// A limitation: a client that sends nothing, closes its sending side, and only then reads from a server that speaks first is reset.
// On the wire this looks the same as a TCP probe, which has its answer when it closes.
func TestHalfCloseWithoutRequestIsATCPProbe(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		s.serveBanner(t)
		bpftest.Do(t, s.Node.NS, func() error {
			if reply, err := halfClose(netip.AddrPortFrom(addr, bannerPort), ""); !errors.Is(err, unix.ECONNRESET) {
				return fmt.Errorf("the client got %q, %w", reply, err)
			}
			return nil
		})
		if n := s.counters(t)["answered_tcp"]; n != 1 {
			t.Errorf("%d answered TCP probes", n)
		}
		s.wantNothingLeft(t)
	})
}

// A complete TLS session takes place between client and pod.
func TestTLSIsHandedOver(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		const port = 8443
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			_, _ = w.Write(body)
		}))
		_ = server.Listener.Close()
		server.Listener = s.Listen(t, port)
		server.StartTLS()
		t.Cleanup(server.Close)
		s.armPort(t, port)
		trusted := x509.NewCertPool()
		trusted.AddCert(server.Certificate())
		client := http.Client{Timeout: patience, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: trusted, ServerName: "example.com"}, // httptest's certificate
			DialContext: func(_ context.Context, _, address string) (conn net.Conn, err error) {
				err = inNS(s.Node.NS, func() error {
					conn, err = net.DialTimeout("tcp", address, patience)
					return err
				})
				return conn, err
			},
		}}
		for _, n := range []int{0, 1000, 100_000} { // on one connection
			body := strings.Repeat("x", n)
			reply, err := client.Post("https://"+netip.AddrPortFrom(addr, port).String(), "", strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(reply.Body); err != nil || string(got) != body {
				t.Fatalf("%d of %d bytes came back, %v", len(got), n, err)
			}
		}
		client.CloseIdleConnections()
		if n := s.counters(t)["handed_over"]; n != 1 {
			t.Errorf("%d connections were handed over", n)
		}
		s.wantNothingLeft(t)
	})
}

// A client whose process is killed leaves nothing behind, whatever it was doing.
func TestKilledClient(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		s.serveEchoOn(t, echoPort)
		for i := range 10 {
			client := exec.Command("/proc/self/exe")
			client.Env = append(os.Environ(), foreverEnv+"="+netip.AddrPortFrom(addr, echoPort).String())
			client.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
			if err := inNS(s.Node.NS, client.Start); err != nil {
				t.Fatal(err)
			}
			polltest.Eventually(t, "the client has connected", func() bool {
				flows, err := s.d.Flows()
				return err != nil || flows > 0
			})
			time.Sleep(time.Duration(i) * time.Millisecond)
			_ = client.Process.Kill()
			_ = client.Wait() // killed
			s.wantNothingLeft(t)
		}
	})
}

// foreverEnv turns the test binary into a client that exchanges data with an echo server until it is killed. Its value is the address.
const foreverEnv = "PROBELET_TEST_FOREVER"

func runForever(address string) error {
	conn, err := dialFrom(netip.AddrPort{}, netip.MustParseAddrPort(address))
	if err != nil {
		return err
	}
	go func() { _, _ = io.Copy(io.Discard, conn) }()
	for block := make([]byte, 100_000); ; {
		if _, err := conn.Write(block); err != nil {
			return err
		}
	}
}

// A client never sends more than can be stored until the pod has its connection.
func TestFirstWindow(t *testing.T) {
	const window = 2048 // STORED_MAX in bpf/abi.h
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		dropper := s.NewDropper(t)
		s.serveEchoOn(t, echoPort)
		dropper.At(t, bpftest.PodIn, echoPort, bpftest.Drop{Mask: bpftest.SYN, Flags: bpftest.SYN, Percent: 100})
		conn := s.Dial(t, netip.AddrPortFrom(addr, echoPort).String()).(*net.TCPConn)
		if got := tcpInfo(conn).Snd_wnd; got != window {
			t.Errorf("first window of %d bytes", got)
		}
		const n = 100_000
		sent := make(chan error, 1)
		go func() {
			_, err := conn.Write(make([]byte, n))
			sent <- errors.Join(err, conn.CloseWrite())
		}()
		polltest.Eventually(t, "the client repeats what it has sent", func() bool { return tcpInfo(conn).Total_retrans > 0 })
		if info := tcpInfo(conn); info.Bytes_sent-info.Bytes_retrans > window {
			t.Errorf("the client has sent %d bytes, some of them repeated: %d", info.Bytes_sent, info.Bytes_retrans)
		}
		dropper.Stop(t, echoPort)
		_ = conn.SetDeadline(time.Now().Add(patience))
		got, err := io.ReadAll(conn)
		if err := errors.Join(err, <-sent); err != nil || len(got) != n {
			t.Errorf("%d bytes came back, %v", len(got), err)
		}
		_ = conn.Close()
		s.wantNothingLeft(t)
	})
}

// A pod that has just been started must resolve its neighbours first. Handing a connection over must not prolong that.
func TestNewPod(t *testing.T) {
	const longer = 1500 * time.Millisecond // it used to take up to 4 s
	for _, way := range ways {
		for name, request := range map[string]string{"GET": unknown, "POST": post(300_000)} {
			t.Run(fmt.Sprintf("%s %s", way, name), func(t *testing.T) {
				t.Parallel()
				node := bpftest.NewNode(t)
				plain := serve(t, node.AddPod(t), way)
				plain.expirePort(t, 8080)
				handed := serve(t, node.AddPod(t), way)
				var took [2]time.Duration
				for i, s := range []*served{plain, handed} {
					start := time.Now()
					if reply := s.ask(t, node.NS, s.IPv6, request); !strings.Contains(reply, name+" /x") {
						t.Fatalf("reply %q", reply)
					}
					took[i] = time.Since(start)
				}
				if took[1] > took[0]+longer {
					t.Errorf("took %v handed over, %v passed on", took[1], took[0])
				}
				if n := handed.counters(t)["handed_over"]; n != 1 {
					t.Errorf("%d connections were handed over", n)
				}
			})
		}
	}
}
