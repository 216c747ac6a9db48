package kubectl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/utils/exec"

	"github.com/probelet/probelet/daemon/internal/status"
)

// apiServer serves a test's objects, and runs commands in containers with the kubelet's own SPDY code. Like an old server it refuses
// WebSockets, which clients try first. The tests in e2e/cluster use a real API server.
type apiServer struct {
	*httptest.Server
	t     *testing.T
	pods  []*corev1.Pod
	nodes []string
	// forbidden lists the paths that the user has no permission for.
	forbidden []string
	// says has the output and exit code of probeletctl, by the daemon's pod.
	says map[string]func(args []string) (text string, code int)
}

func newAPIServer(t *testing.T) *apiServer {
	s := &apiServer{t: t, says: map[string]func([]string) (string, int){}}
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

func (s *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	path := strings.Split(strings.TrimPrefix(r.URL.Path, "/api/v1/"), "/")
	switch {
	case slices.Contains(s.forbidden, r.URL.Path):
		s.refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, r.URL.Path+" is forbidden")
	case path[len(path)-1] == "exec":
		s.exec(w, r, path[3])
	case r.URL.Path == "/api/v1/nodes":
		list := corev1.NodeList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NodeList"}}
		for _, name := range s.nodes {
			list.Items = append(list.Items, corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}})
		}
		s.answer(w, list)
	case path[len(path)-1] == "pods":
		s.list(w, r, path)
	default:
		for _, p := range s.pods {
			if len(path) == 4 && p.Namespace == path[1] && p.Name == path[3] {
				p.APIVersion, p.Kind = "v1", "Pod"
				s.answer(w, p)
				return
			}
		}
		s.refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound, "pods "+path[len(path)-1]+" not found")
	}
}

func (s *apiServer) list(w http.ResponseWriter, r *http.Request, path []string) {
	list := corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}}
	node, _ := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "spec.nodeName=")
	for _, p := range s.pods {
		switch {
		case len(path) == 3 && p.Namespace != path[1], node != "" && p.Spec.NodeName != node:
		case r.URL.Query().Get("labelSelector") == selector && p.Labels["app.kubernetes.io/name"] != "probelet":
		default:
			list.Items = append(list.Items, *p)
		}
	}
	s.answer(w, list)
}

func (s *apiServer) answer(w http.ResponseWriter, object any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(object); err != nil {
		s.t.Error(err)
	}
}

func (s *apiServer) refuse(w http.ResponseWriter, code int32, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(int(code))
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: code, Reason: reason, Message: message,
	})
}

func (s *apiServer) exec(w http.ResponseWriter, r *http.Request, pod string) {
	if r.Header.Get("Upgrade") == "websocket" {
		http.Error(w, "no web sockets here", http.StatusBadRequest)
		return
	}
	if got := r.URL.Query().Get("container"); got != container {
		s.t.Errorf("asked container %q", got)
	}
	command := r.URL.Query()["command"]
	remotecommand.ServeExec(w, r, executor{s}, pod, "", container, command, &remotecommand.Options{Stdout: true, Stderr: true},
		time.Minute, time.Minute, []string{"v4.channel.k8s.io"})
}

type executor struct{ *apiServer }

func (e executor) ExecInContainer(_ context.Context, pod, _, _ string, command []string, _ io.Reader, stdout, stderr io.WriteCloser,
	_ bool, _ <-chan remotecommand.TerminalSize, _ time.Duration,
) error {
	says := e.says[pod]
	if says == nil {
		return errors.New("container not found")
	}
	text, code := says(command[1:])
	_, _ = io.WriteString(stdout, text)
	if code == 0 {
		return nil
	}
	_, _ = fmt.Fprintf(stderr, "probeletctl: says %d\n", code)
	return exec.CodeExitError{Err: fmt.Errorf("exit status %d", code), Code: code}
}

// daemon adds a node with a daemon's pod that reports this summary.
func (s *apiServer) daemon(node string, says status.Node) *corev1.Pod {
	controller := true
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "kube-system", Name: "probelet-" + node, Labels: map[string]string{"app.kubernetes.io/name": "probelet"},
			OwnerReferences: []metav1.OwnerReference{{Kind: "DaemonSet", Name: "probelet", Controller: &controller}},
		},
		Spec: corev1.PodSpec{NodeName: node, HostNetwork: true, Containers: []corev1.Container{{Name: container}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{
			Name: container, Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
		}}},
	}
	s.nodes, s.pods = append(s.nodes, node), append(s.pods, p)
	s.says[p.Name] = func(args []string) (string, int) {
		switch {
		case args[0] == "doctor":
			return `[{"verdict":"ok","about":"kernel","what":"Linux 6.1"},{"verdict":"note","about":"runtime","what":"none seen"}]`, 0
		case slices.Contains(args, "--summary"):
			text, err := json.Marshal(says)
			if err != nil {
				s.t.Error(err)
			}
			if !says.Running {
				return string(text), status.DaemonDown
			}
			return string(text), 0
		}
		return "relayed: " + strings.Join(args, " ") + "\n", 0
	}
	return p
}

func (s *apiServer) pod(namespace, name, node string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: corev1.PodSpec{NodeName: node}}
	s.pods = append(s.pods, p)
	return p
}

func (s *apiServer) run(args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	config := filepath.Join(s.t.TempDir(), "config")
	text := fmt.Sprintf(`{"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": [{"name": "c", "cluster": {"server": %q}}], "users": [{"name": "u", "user": {"token": "t"}}],
		"contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}]}`, s.URL)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.t.Setenv("KUBECONFIG", config)
	var out, errs strings.Builder
	code = status.Exit(&errs, pluginName, execute(s.t.Context(), environment{stdout: &out, stderr: &errs}, args))
	return out.String(), errs.String(), code
}

var ended = metav1.Now()

var well = status.Node{Version: "v1", Running: true, Attached: 3, Endpoints: 4, Answered: 2, Probes: status.Probes{Answered: 30, Passed: 10}}

// The line of a node says what is wrong with it.
func TestClusterStatus(t *testing.T) {
	for name, test := range map[string]struct {
		change func(s *apiServer, p *corev1.Pod)
		code   int
		want   string // a line, with runs of blanks squeezed
	}{
		"well":      {func(*apiServer, *corev1.Pod) {}, status.OK, `node1 yes 3 0 75 % 40 v1 -`},
		"sum":       {func(*apiServer, *corev1.Pod) {}, status.OK, `2 of 2 nodes ready; 6 pods attached, 0 not attached; 75 % of 80 probes answered in the kernel`},
		"not ready": {func(_ *apiServer, p *corev1.Pod) { p.Status.ContainerStatuses[0].Ready = false }, status.Failed, `node1 no 3 0 75 % 40 v1 not ready`},
		"not ready, and why": {func(s *apiServer, _ *corev1.Pod) {
			n := well
			n.NotReady = []string{"no prober was found, so nothing is answered"}
			s.pods, s.nodes = nil, nil
			s.daemon("node1", n)
		}, status.Failed, `node1 no 3 0 75 % 40 v1 no prober was found, so nothing is answered`},
		"daemon dead": {func(s *apiServer, _ *corev1.Pod) {
			s.pods, s.nodes = nil, nil
			s.daemon("node1", status.Node{Version: "v1", NotReady: []string{"probeletd is not running"}})
		}, status.Failed, `node1 no 0 0 - 0 v1 probeletd is not running`},
		"not attached": {func(s *apiServer, _ *corev1.Pod) {
			n := well
			n.Unattached = []status.Unattached{{Pod: "shop/db", Why: "no veth"}, {Pod: "shop/web"}}
			s.pods, s.nodes = nil, nil
			s.daemon("node1", n)
		}, status.OK, `not attached: shop/db on node1: no veth`},
		"another version": {func(s *apiServer, _ *corev1.Pod) {
			n := well
			n.Version = "v2"
			s.daemon("node3", n)
		}, status.OK, `versions differ: v1 on 2 nodes, v2 on 1 node`},
		"without a daemon":        {func(s *apiServer, _ *corev1.Pod) { s.nodes = append(s.nodes, "fargate") }, status.OK, `fargate - - - - - - the daemon has no pod there \(taints, node selector\)`},
		"nodes may not be listed": {func(s *apiServer, _ *corev1.Pod) { s.forbidden = []string{"/api/v1/nodes"} }, status.OK, `kubectl-probelet: warning: nodes without a daemon are not shown: .*forbidden`},
		"no image": {func(_ *apiServer, p *corev1.Pod) {
			p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"}}
		}, status.Failed, `node1 no - - - - - ImagePullBackOff: no such image`},
		"crashes": {func(_ *apiServer, p *corev1.Pod) {
			p.Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
			p.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error"}
		}, status.Failed, `node1 no - - - - - CrashLoopBackOff; exited with code 1: Error`},
		"install refuses": {func(_ *apiServer, p *corev1.Pod) {
			p.Status.Phase = corev1.PodPending
			p.Status.InitContainerStatuses = []corev1.ContainerStatus{{Name: "install", State: corev1.ContainerState{
				Terminated: &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error"}}}}
		}, status.Failed, `node1 no - - - - - container install: exited with code 1: Error`},
		"not scheduled": {func(_ *apiServer, p *corev1.Pod) {
			p.Status = corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "no room"}}}
			p.Spec.NodeName = ""
			p.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
				NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{{Key: "metadata.name", Values: []string{"node1"}}}}}}}}
		}, status.Failed, `node1 no - - - - - not scheduled: no room`},
		"uninstalled": {func(_ *apiServer, p *corev1.Pod) { p.Status.ContainerStatuses[0].Name = "uninstalled" }, status.Failed, `node1 no - - - - - probelet was uninstalled from the node`},
		"terminating": {func(_ *apiServer, p *corev1.Pod) { p.DeletionTimestamp = &ended }, status.Failed, `node1 no - - - - - the pod is terminating`},
		"replaced": {func(s *apiServer, p *corev1.Pod) {
			old := *p
			old.Name, old.DeletionTimestamp = "probelet-old", &ended
			s.pods = append(s.pods, &old)
		}, status.OK, `node1 yes 3 0 75 % 40 v1 -`},
		"cannot be asked": {func(s *apiServer, p *corev1.Pod) { delete(s.says, p.Name) }, status.Failed, `node1 no - - - - - cannot be asked: .*container not found`},
		"may not be asked": {func(s *apiServer, _ *corev1.Pod) {
			s.forbidden = []string{"/api/v1/namespaces/kube-system/pods/probelet-node1/exec"}
		}, status.Failed, `node1 no - - - - - cannot be asked: .*forbidden`},
		"too old": {func(s *apiServer, p *corev1.Pod) {
			s.says[p.Name] = func([]string) (string, int) { return "", 2 }
		}, status.Failed, `node1 no - - - - - cannot be asked: probeletctl: says 2`},
		// Any pod can have the label.
		"an impostor": {func(s *apiServer, p *corev1.Pod) {
			s.pod("shop", "probelet", "node2").Labels = p.Labels
		}, status.OK, `2 of 2 nodes ready; .*`},
		"two DaemonSets": {func(s *apiServer, p *corev1.Pod) {
			other := *p
			other.Namespace = "shop"
			s.pods = append(s.pods, &other)
		}, status.Usage, `kubectl-probelet: pods labelled app.kubernetes.io/name=probelet are in several namespaces, kube-system, shop: pass probelet's as --daemon-namespace`},
		"not there":    {func(s *apiServer, _ *corev1.Pod) { s.pods = nil }, status.DaemonDown, `kubectl-probelet: no DaemonSet has pods labelled .*`},
		"may not list": {func(s *apiServer, _ *corev1.Pod) { s.forbidden = []string{"/api/v1/pods"} }, status.NotAllowed, `kubectl-probelet: .*; if you may list pods in probelet's namespace, pass it as --daemon-namespace`},
	} {
		t.Run(name, func(t *testing.T) {
			s := newAPIServer(t)
			p := s.daemon("node1", well)
			s.daemon("node2", well)
			test.change(s, p)
			stdout, stderr, code := s.run("status")
			squeezed := regexp.MustCompile(` +`).ReplaceAllString(stdout+stderr, " ")
			if code != test.code || !regexp.MustCompile(`(?m)^`+test.want+`$`).MatchString(squeezed) {
				t.Errorf("%d, want %d, and %s:\n%s%s", code, test.code, test.want, stdout, stderr)
			}
			if stdout, _, code := s.run("status", "-o", "json"); code != test.code || code <= 1 && !json.Valid([]byte(stdout)) {
				t.Errorf("%d, in JSON:\n%s", code, stdout)
			}
		})
	}
}

func TestClusterStatusOfANamespace(t *testing.T) {
	s := newAPIServer(t)
	n := well
	n.Unattached = []status.Unattached{{Pod: "bank/safe"}, {Pod: "shop/web"}}
	s.daemon("node1", n)
	for want, args := range map[string][]string{
		"bank/safe shop/web":  {"status"},
		"bank/safe shop/web ": {"status", "-A"},
		"bank/safe":           {"status", "-n", "bank"},
		"":                    {"status", "--namespace", "ban"},
	} {
		stdout, stderr, code := s.run(args...)
		got := regexp.MustCompile(`[a-z]+/[a-z]+`).FindAllString(stdout, -1)
		if code != 0 || !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%q: %d, %q\n%s", args, code, got, stdout+stderr)
		}
	}
}

// Questions about a pod or node go to its daemon, and the output and exit code come back unchanged.
func TestRelay(t *testing.T) {
	for name, test := range map[string]struct {
		change func(s *apiServer)
		args   []string
		code   int
		says   string // of stdout or stderr
	}{
		"of kubectl's namespace": {nil, []string{"explain", "web"}, 0, "relayed: explain shop/web -o text --width=0\n"},
		"of a namespace":         {nil, []string{"explain", "-n", "bank", "safe"}, 0, "relayed: explain bank/safe -o text"},
		"with its namespace":     {nil, []string{"explain", "bank/safe", "-o", "json"}, 0, "relayed: explain bank/safe -o json"},
		"two namespaces":         {nil, []string{"explain", "-n", "shop", "bank/safe"}, status.Usage, `"bank/safe": must be POD or NAMESPACE/POD, in --namespace shop`},
		"of none":                {nil, []string{"explain"}, status.Usage, "0 arguments: must be one"},
		"no pod":                 {nil, []string{"explain", "nobody"}, status.NotFound, "nobody not found"},
		"not scheduled":          {func(s *apiServer) { s.pod("shop", "new", "") }, []string{"explain", "new"}, status.NotFound, "pod shop/new is not scheduled yet"},
		"host's network":         {func(s *apiServer) { s.pod("shop", "agent", "node1").Spec.HostNetwork = true }, []string{"explain", "agent"}, status.NotFound, "pod shop/agent has hostNetwork"},
		"not probelet's node":    {func(s *apiServer) { s.pod("shop", "far", "node9") }, []string{"explain", "far"}, status.DaemonDown, "node node9: probelet's daemon has no pod there"},
		"may not see the pod":    {func(s *apiServer) { s.forbidden = []string{"/api/v1/namespaces/shop/pods/web"} }, []string{"explain", "web"}, status.NotAllowed, "forbidden"},
		"may not ask": {func(s *apiServer) {
			s.forbidden = []string{"/api/v1/namespaces/kube-system/pods/probelet-node1/exec"}
		}, []string{"explain", "web"}, status.NotAllowed, "forbidden"},
		"exit code": {func(s *apiServer) {
			s.says["probelet-node1"] = func([]string) (string, int) { return "what is known\n", status.DaemonDown }
		}, []string{"explain", "web"}, status.DaemonDown, "what is known\nprobeletctl: says 3\n"},
		"daemon's pod crashes": {func(s *apiServer) {
			s.pods[0].Status.ContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
		}, []string{"explain", "web"}, status.DaemonDown, "node node1: pod kube-system/probelet-node1: CrashLoopBackOff; probeletctl on the node shows what the kernel still answers"},
		"status of a node":    {nil, []string{"status", "--node", "node2"}, 0, "relayed: status -o table --width=0\n"},
		"and of a namespace":  {nil, []string{"status", "--node", "node2", "-n", "shop", "-o", "wide"}, 0, "relayed: status -o wide -n shop --width=0\n"},
		"width":               {nil, []string{"status", "--node", "node2", "--width", "70"}, 0, "--width=70\n"},
		"no such node":        {nil, []string{"status", "--node", "node9"}, status.DaemonDown, "node node9: probelet's daemon has no pod"},
		"no format":           {nil, []string{"status", "-o", "xml"}, status.Usage, `--output "xml": must be one of table|wide|json`},
		"all and one":         {nil, []string{"status", "-A", "-n", "shop"}, status.Usage, `--namespace "shop", --all-namespaces: must be one or the other`},
		"no command":          {nil, []string{"stauts"}, status.Usage, `unknown command "stauts" for "kubectl probelet"`},
		"no such context":     {nil, []string{"status", "--context", "nowhere"}, status.Failed, `context "nowhere" does not exist`},
		"its namespace":       {nil, []string{"explain", "web", "--daemon-namespace", "elsewhere"}, status.DaemonDown, "node node1: probelet's daemon has no pod"},
		"no patience":         {nil, []string{"status", "--node-timeout", "0s"}, status.Usage, "--node-timeout 0s: must be more than 0"},
		"completion":          {nil, []string{"__complete", "explain", ""}, 0, "web\n:4\n"},
		"completion of nodes": {nil, []string{"__complete", "status", "--node", ""}, 0, "node1\nnode2\n:4\n"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newAPIServer(t)
			s.daemon("node1", well)
			s.daemon("node2", well)
			s.pod("shop", "web", "node1")
			s.pod("bank", "safe", "node2")
			if test.change != nil {
				test.change(s)
			}
			stdout, stderr, code := s.run(test.args...)
			if code != test.code || !strings.Contains(stdout+stderr, test.says) {
				t.Errorf("%d, want %d, and %q:\n%s%s", code, test.code, test.says, stdout, stderr)
			}
		})
	}
}

func TestClusterDoctor(t *testing.T) {
	s := newAPIServer(t)
	s.daemon("node1", well)
	ill := s.daemon("node2", well)
	gone := s.daemon("node3", well)
	stdout, stderr, code := s.run("doctor")
	if want := "note     runtime       none seen\n"; code != 0 || strings.Count(stdout, want) != 3 || strings.Contains(stdout, "kernel") {
		t.Errorf("%d\n%s%s", code, stdout, stderr)
	}
	if stdout, _, code = s.run("doctor", "--node", "node1"); code != 0 || !strings.Contains(stdout, "ok       kernel        Linux 6.1\n") || strings.Contains(stdout, "node2") {
		t.Errorf("%d\n%s", code, stdout)
	}
	s.says[ill.Name] = func([]string) (string, int) {
		return `[{"verdict":"PROBLEM","about":"chain","what":"the plugin is not in it","do":"probeletd install"}]`, status.Failed
	}
	delete(s.says, gone.Name)
	stdout, stderr, code = s.run("doctor")
	if code != status.Failed || stderr != "kubectl-probelet: 2 problems on 2 of 3 nodes\n" {
		t.Errorf("%d, %s\n%s", code, stderr, stdout)
	}
	for _, want := range []string{
		"node2\nPROBLEM  chain         the plugin is not in it\n                       -> probeletd install\n",
		"node3\nPROBLEM  pod           kube-system/probelet-node3: cannot be asked: ",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("does not say %q:\n%s", want, stdout)
		}
	}
	var all []Examined
	if stdout, _, code = s.run("doctor", "-o", "json"); code != status.Failed || json.Unmarshal([]byte(stdout), &all) != nil || len(all) != 3 {
		t.Errorf("%d\n%s", code, stdout)
	}
}

// A node that does not reply does not keep the others from being shown.
func TestSilentNode(t *testing.T) {
	s := newAPIServer(t)
	silent := s.daemon("node1", well)
	s.daemon("node2", well)
	released := make(chan struct{})
	t.Cleanup(func() { close(released) })
	s.says[silent.Name] = func([]string) (string, int) { <-released; return "", 0 }
	stdout, _, code := s.run("status", "--node-timeout", "300ms")
	if code != status.Failed || !regexp.MustCompile(`node2 +yes`).MatchString(stdout) || !regexp.MustCompile(`node1 +no .*cannot be asked: no answer within 300ms`).MatchString(stdout) {
		t.Errorf("%d\n%s", code, stdout)
	}
	s.pod("shop", "web", "node1")
	if _, stderr, code := s.run("explain", "web", "--node-timeout", "300ms"); code != status.Failed || !strings.Contains(stderr, "node node1: no answer within 300ms") {
		t.Errorf("%d, %s", code, stderr)
	}
}

func TestEachNodeKeepsTheOrder(t *testing.T) {
	daemons := map[string]*corev1.Pod{}
	for i := range 100 {
		daemons[fmt.Sprintf("node%03d", i)] = &corev1.Pod{}
	}
	got := eachNode(daemons, func(node string, _ *corev1.Pod) string { return node })
	if want := slices.Sorted(maps.Keys(daemons)); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestNamed(t *testing.T) {
	for program, want := range map[string]bool{
		"kubectl-probelet": true, "/usr/local/bin/kubectl-probelet": true, "kubectl-probelet.exe": true,
		"kubectl_complete-probelet": true, "probeletctl": false, "kubectl-probeletd": false,
	} {
		if Named(program) != want {
			t.Errorf("%s: %t", program, !want)
		}
	}
}

// Without a kubeconfig, every command names the flag.
func TestNoKubeconfig(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	t.Setenv("KUBECONFIG", missing)
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, args := range [][]string{{"status"}, {"status", "--node", "n"}, {"doctor"}, {"explain", "web"}, {"explain", "shop/web"}, {"estimate"}} {
		for want, args := range map[string][]string{
			"no kubeconfig: name one with --kubeconfig": args,
			"--kubeconfig: stat " + missing:             append(args[:len(args):len(args)], "--kubeconfig", missing),
		} {
			var out strings.Builder
			code := status.Exit(&out, pluginName, execute(t.Context(), environment{stdout: &out, stderr: &out}, args))
			if code != status.Failed || !strings.HasPrefix(out.String(), pluginName+": "+want) {
				t.Errorf("%q: %d, %s, want %s", args, code, out.String(), want)
			}
		}
	}
}
