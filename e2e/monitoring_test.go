package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/prometheus/prometheus/promql/parser"

	"github.com/probelet/probelet/e2e/harness/alerts"
	"github.com/probelet/probelet/e2e/harness/node"
)

const relayPort = "9553"

// newRelay starts a relay without privileges or capabilities in the network of a pod, as the chart does.
func (s *scene) newRelay() (url string) {
	s.t.Helper()
	p, err := s.NewPod()
	must(s.t, err)
	must(s.t, p.Add())
	cmd := exec.Command(filepath.Join(s.Bin, "probeletd"), "metrics", "--listen", ":"+relayPort, "--state-dir", s.seenByNobody())
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	must(s.t, ns.WithNetNSPath(p.Netns, func(ns.NetNS) error { return cmd.Start() }))
	s.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return "http://" + net.JoinHostPort(p.IPv4.String(), relayPort)
}

// seenByNobody contains what the relay's pod mounts of the state directory: the metrics directory.
func (s *scene) seenByNobody() string {
	s.t.Helper()
	dir, err := os.MkdirTemp("/run", "relay")
	must(s.t, err)
	mounted := filepath.Join(dir, "metrics")
	must(s.t, os.Chmod(dir, 0o755))
	must(s.t, os.Mkdir(mounted, 0o755))
	must(s.t, syscall.Mount(filepath.Join(s.StateDir, "metrics"), mounted, "", syscall.MS_BIND, ""))
	must(s.t, syscall.Mount("", mounted, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	s.t.Cleanup(func() { _ = syscall.Unmount(mounted, 0); _ = os.RemoveAll(dir) })
	return dir
}

func scrape(url string) (status int, text string, err error) {
	client := http.Client{Timeout: deadline, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close() //nolint:errcheck // read only
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, string(body), err
}

// awaitScrape scrapes until the relay answers with this status and all these parts.
func (s *scene) awaitScrape(url string, status int, parts ...string) string {
	s.t.Helper()
	var got int
	var text string
	var err error
	if !within(deadline, func() bool {
		got, text, err = scrape(url)
		missing := func(part string) bool { return !strings.Contains(text, part) }
		return err == nil && got == status && !slices.ContainsFunc(parts, missing)
	}) {
		s.t.Fatalf("%s: %d, %v, want %d with %q in\n%s", url, got, err, status, parts, text)
	}
	return text
}

// A healthy node, scraped the way the chart sets it up, fires no alert; a node whose prober is gone fires the alert for that.
// Every alert selects existing series.
func TestMonitoring(t *testing.T) {
	s := newScene(t, node.PTP)
	s.newFreshPod(longHTTP)
	must(t, s.daemon.Stop())
	s.startDaemon("--cni-net-dir", s.NetDir(), "--cni-bin-dir", s.PluginDir())
	url := s.newRelay()
	text := s.awaitScrape(url+"/metrics", http.StatusOK, "probelet_chain_joined 1", `probelet_endpoints{mode="answer",state="fresh"} 1`)
	rules, err := alerts.Read("../cni-conf/helm/probelet/alerts.yaml")
	must(t, err)
	expectFiring := func(text, up, want string) {
		t.Helper()
		series, err := alerts.Scraped(text + "\nup{job=\"probelet\"} " + up + "\n")
		must(t, err)
		firing, err := series.Evaluate(rules)
		must(t, err)
		if got := fmt.Sprint(firing); len(firing) > 1 || want == "" != (len(firing) == 0) || !strings.Contains(got, want) {
			t.Errorf("%s fire, want %q", got, want)
		}
	}
	expectFiring(text, "1", "")
	for _, rule := range rules {
		expectSeries(t, rule.Alert, rule.Expr, text+"\nup{job=\"probelet\"} 1\n")
	}
	for _, other := range []string{"/readyz", "/v1/endpoints", "/debug/pprof/heap"} {
		if status, text, err := scrape(url + other); err != nil || status != http.StatusNotFound {
			t.Errorf("%s: %d, %v, %s", other, status, err, text)
		}
	}

	s.daemon.Kill()
	s.awaitScrape(url+"/metrics", http.StatusBadGateway)
	expectFiring("", "0", "ProbeletDown")
	s.startDaemon("--prober", "kubelet", "--repair=false")
	expectFiring(s.awaitScrape(url+"/metrics", http.StatusOK, "probelet_prober_found 0"), "1", "ProbeletProberNotFound")
}

// expectSeries checks that each selector matches something.
func expectSeries(t *testing.T, alert, expr, text string) {
	t.Helper()
	root, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
	must(t, err)
	series, err := alerts.Scraped(text)
	must(t, err)
	parser.Inspect(root, func(n parser.Node, _ []parser.Node) error {
		selector, ok := n.(*parser.VectorSelector)
		if !ok {
			return nil
		}
		for _, one := range series {
			matches := true
			for _, m := range selector.LabelMatchers {
				matches = matches && m.Matches(one.Metric.Get(m.Name))
			}
			if matches {
				return nil
			}
		}
		t.Errorf("%s: no series matches %s", alert, selector)
		return nil
	})
}
