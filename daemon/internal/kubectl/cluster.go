package kubectl

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/probelet/probelet/daemon/internal/status"
)

const (
	// selector matches the daemon's pods, and container is its container in them, as in the chart and the kustomize base.
	selector  = "app.kubernetes.io/name=probelet"
	container = "probeletd"
)

// cluster gives access to the API server, and through it to the daemons on the nodes.
type cluster struct {
	config *rest.Config
	core   rest.Interface
	codec  runtime.ParameterCodec
	// namespace is the daemons' namespace; if empty, all namespaces are searched.
	namespace string
}

func connect(config *rest.Config, namespace string) (*cluster, error) {
	// Only the core API, because all of client-go's would make the program much larger.
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	config = rest.CopyConfig(config)
	config.APIPath = "/api"
	config.GroupVersion = &corev1.SchemeGroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.UserAgent = "kubectl-probelet"
	core, err := rest.RESTClientFor(config)
	return &cluster{config, core, runtime.NewParameterCodec(scheme), namespace}, err
}

// daemons returns the daemons' pods by node, or that of the given node. It returns an error if there is none.
func (c *cluster) daemons(ctx context.Context, node string) (map[string]*corev1.Pod, error) {
	options := metav1.ListOptions{LabelSelector: selector}
	if node != "" {
		options.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", node).String()
	}
	var list corev1.PodList
	err := c.core.Get().Namespace(c.namespace).Resource("pods").VersionedParams(&options, c.codec).Do(ctx).Into(&list)
	if apierrors.IsForbidden(err) && c.namespace == "" {
		return nil, status.Errorf(status.NotAllowed, "%w; if you may list pods in probelet's namespace, pass it as --daemon-namespace", err)
	}
	if err != nil {
		return nil, failure(err)
	}
	namespaces := map[string]bool{}
	found := map[string]*corev1.Pod{}
	for i := range list.Items {
		p := &list.Items[i]
		if !isDaemon(p) {
			continue
		}
		namespaces[p.Namespace] = true
		if other := found[nodeOf(p)]; other == nil || better(p, other) {
			found[nodeOf(p)] = p
		}
	}
	switch {
	case len(namespaces) > 1: // one of them may impersonate probelet
		names := make([]string, 0, len(namespaces))
		for name := range namespaces {
			names = append(names, name)
		}
		slices.Sort(names)
		return nil, status.Errorf(status.Usage, "pods labelled %s are in several namespaces, %s: pass probelet's as --daemon-namespace", selector, strings.Join(names, ", "))
	case len(found) == 0 && node != "":
		return nil, status.Errorf(status.DaemonDown, "node %s: probelet's daemon has no pod there", node)
	case len(found) == 0:
		return nil, status.Errorf(status.DaemonDown, "no DaemonSet has pods labelled %s in %s: is probelet installed?", selector, cmp.Or(c.namespace, "any namespace"))
	}
	return found, nil
}

// isDaemon distinguishes the DaemonSet's pods from other pods with the same label.
func isDaemon(p *corev1.Pod) bool {
	owner := metav1.GetControllerOf(p)
	return owner != nil && owner.Kind == "DaemonSet" && p.Spec.HostNetwork
}

// nodeOf returns the node of a pod. A DaemonSet's pod names its node even before it is scheduled.
func nodeOf(p *corev1.Pod) string {
	if p.Spec.NodeName != "" || p.Spec.Affinity == nil || p.Spec.Affinity.NodeAffinity == nil {
		return p.Spec.NodeName
	}
	required := p.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	if required != nil {
		for _, term := range required.NodeSelectorTerms {
			for _, field := range term.MatchFields {
				if field.Key == "metadata.name" && len(field.Values) == 1 {
					return field.Values[0]
				}
			}
		}
	}
	return ""
}

// better reports whether p is the one to ask of two pods on a node: while one is terminating, its successor may be running.
func better(p, other *corev1.Pod) bool {
	rank := func(p *corev1.Pod) int {
		switch {
		case p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning:
			return 2
		case p.DeletionTimestamp == nil:
			return 1
		}
		return 0
	}
	return rank(p) > rank(other)
}

// nodes returns the names of all nodes.
func (c *cluster) nodes(ctx context.Context) ([]string, error) {
	var list corev1.NodeList
	if err := c.core.Get().Resource("nodes").Do(ctx).Into(&list); err != nil {
		return nil, failure(err)
	}
	var names []string
	for i := range list.Items {
		names = append(names, list.Items[i].Name)
	}
	return names, nil
}

// pod returns a pod that has been scheduled.
func (c *cluster) pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	var p corev1.Pod
	if err := c.core.Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(&p); err != nil {
		return nil, failure(err)
	}
	if p.Spec.NodeName == "" {
		return nil, status.Errorf(status.NotFound, "pod %s/%s is not scheduled yet", namespace, name)
	}
	return &p, nil
}

// pods returns the names of a namespace's pods, for completion.
func (c *cluster) pods(ctx context.Context, namespace string) (names []string) {
	var list corev1.PodList
	_ = c.core.Get().Namespace(namespace).Resource("pods").Do(ctx).Into(&list) // best effort
	for i := range list.Items {
		names = append(names, list.Items[i].Name)
	}
	return names
}

// failure adds exit codes to the API server's errors.
func failure(err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return &status.Error{Code: status.NotFound, Err: err}
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return &status.Error{Code: status.NotAllowed, Err: err}
	}
	return err
}

// ask runs probeletctl in a daemon's pod and copies its output. If it fails, the error has its exit code.
//
// Running it there needs no port, no further privileges on the node and no permissions that an administrator does not have already.
// Port forwarding only reaches TCP listeners, so the daemon would have to serve to every process on the node what it now serves only
// to root, on its socket.
func (c *cluster) ask(ctx context.Context, daemon *corev1.Pod, stdout, stderr io.Writer, args ...string) error {
	url := c.core.Post().Namespace(daemon.Namespace).Resource("pods").Name(daemon.Name).SubResource("exec").VersionedParams(
		&corev1.PodExecOptions{Container: container, Command: append([]string{"probeletctl"}, args...), Stdout: true, Stderr: true}, c.codec).URL()
	// Like kubectl exec: over a WebSocket, or SPDY if a server or proxy does not support that.
	socket, err := remotecommand.NewWebSocketExecutor(c.config, "GET", url.String())
	if err != nil {
		return err
	}
	spdy, err := remotecommand.NewSPDYExecutor(c.config, "POST", url)
	if err != nil {
		return err
	}
	forbidden := false
	executor, err := remotecommand.NewFallbackExecutor(socket, spdy, func(err error) bool {
		var upgrade *httpstream.UpgradeFailureError
		if errors.As(err, &upgrade) && (apierrors.IsForbidden(upgrade.Cause) || apierrors.IsUnauthorized(upgrade.Cause)) {
			forbidden = true // as "get"; SPDY needs "create", and its error has no code
		}
		return upgrade != nil || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	out, errs := &gate{w: stdout}, &gate{w: stderr}
	defer out.close()
	defer errs.close()
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: out, Stderr: errs})
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var exit exec.CodeExitError
	if errors.As(err, &exit) && exit.Code <= status.NotAllowed {
		return &status.Error{Code: exit.Code, Err: err, Shown: true}
	}
	if err != nil && forbidden {
		return &status.Error{Code: status.NotAllowed, Err: err}
	}
	return failure(err)
}

// gate passes writes on until it is closed. When ctx ends, StreamWithContext returns before its goroutines have stopped writing.
type gate struct {
	mutex  sync.Mutex
	w      io.Writer
	closed bool
}

func (g *gate) Write(p []byte) (int, error) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	if g.closed {
		return 0, io.ErrClosedPipe
	}
	return g.w.Write(p)
}

func (g *gate) close() {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	g.closed = true
}

// read runs probeletctl and decodes its JSON output.
func read[T any](ctx context.Context, c *cluster, daemon *corev1.Pod, args ...string) (reply T, err error) {
	var stdout, stderr bytes.Buffer
	err = c.ask(ctx, daemon, &stdout, &stderr, append(args, "-o", "json")...)
	if json.Unmarshal(stdout.Bytes(), &reply) == nil {
		return reply, nil // it also says why the exit code is not 0
	}
	if said := strings.TrimSpace(stderr.String()); err != nil && said != "" {
		err = errors.New(said)
	}
	if err == nil {
		err = fmt.Errorf("probeletctl printed %.100q, which is not the expected JSON", stdout.String())
	}
	return reply, err
}

// trouble says what is wrong with a daemon's pod as far as the API server knows; empty if nothing is. It also reports whether
// probeletctl can be run in the pod.
func trouble(p *corev1.Pod) (why string, reachable bool) {
	if p.DeletionTimestamp != nil {
		return "the pod is terminating", false
	}
	for _, s := range p.Status.InitContainerStatuses {
		if why := waiting(s); why != "" && !s.Ready {
			return "container " + s.Name + ": " + why, false
		}
	}
	for _, s := range p.Status.ContainerStatuses {
		switch why := waiting(s); {
		case s.Name == "uninstalled":
			return "probelet was uninstalled from the node", false
		case s.Name != container:
		case why != "":
			return why, false
		case s.State.Running != nil && !s.Ready:
			return "not ready", true
		case s.State.Running != nil:
			return "", true
		}
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
			return "not scheduled: " + cmp.Or(c.Message, c.Reason), false
		}
	}
	return "the pod is " + strings.ToLower(string(cmp.Or(p.Status.Phase, corev1.PodPending))), false
}

// waiting says why a container is not running; empty if it is, or if it has succeeded.
func waiting(s corev1.ContainerStatus) string {
	var said []string
	if w := s.State.Waiting; w != nil {
		said = append(said, strings.TrimSuffix(w.Reason+": "+w.Message, ": "))
	}
	for _, t := range []*corev1.ContainerStateTerminated{s.State.Terminated, s.LastTerminationState.Terminated} {
		if t != nil && t.ExitCode != 0 && s.State.Running == nil {
			said = append(said, strings.TrimSuffix(fmt.Sprintf("exited with code %d: %s", t.ExitCode, cmp.Or(t.Message, t.Reason)), ": "))
		}
	}
	return strings.Join(said, "; ")
}
