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
	// selector finds the daemon's pods, and container is the daemon's in them: as in the chart and the kustomize base.
	selector  = "app.kubernetes.io/name=probelet"
	container = "probeletd"
)

// cluster is what the API server says, and the nodes' daemons through it.
type cluster struct {
	config *rest.Config
	core   rest.Interface
	codec  runtime.ParameterCodec
	// namespace is where the daemons are; empty: anywhere.
	namespace string
}

func connect(config *rest.Config, namespace string) (*cluster, error) {
	// The core API only: all of client-go's would make the program much larger.
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

// daemons returns the daemons' pods, by node; of one node if that is not empty. There is at least one.
func (c *cluster) daemons(ctx context.Context, node string) (map[string]*corev1.Pod, error) {
	options := metav1.ListOptions{LabelSelector: selector}
	if node != "" {
		options.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", node).String()
	}
	var list corev1.PodList
	err := c.core.Get().Namespace(c.namespace).Resource("pods").VersionedParams(&options, c.codec).Do(ctx).Into(&list)
	if apierrors.IsForbidden(err) && c.namespace == "" {
		return nil, status.Errorf(status.NotAllowed, "%w; if you may list those of probelet's namespace, say with --daemon-namespace which that is", err)
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
	case len(namespaces) > 1: // one of them may be somebody's who wants to be taken for probelet
		names := make([]string, 0, len(namespaces))
		for name := range namespaces {
			names = append(names, name)
		}
		slices.Sort(names)
		return nil, status.Errorf(status.Usage, "pods labelled %s are in namespaces %s: say with --daemon-namespace which are probelet's", selector, strings.Join(names, ", "))
	case len(found) == 0 && node != "":
		return nil, status.Errorf(status.DaemonDown, "node %s: no pod of probelet's daemon is there", node)
	case len(found) == 0:
		return nil, status.Errorf(status.DaemonDown, "no pods of a DaemonSet are labelled %s in %s: is probelet installed?", selector, cmp.Or(c.namespace, "any namespace"))
	}
	return found, nil
}

// isDaemon tells the DaemonSet's pods from others that have its label.
func isDaemon(p *corev1.Pod) bool {
	owner := metav1.GetControllerOf(p)
	return owner != nil && owner.Kind == "DaemonSet" && p.Spec.HostNetwork
}

// nodeOf is where a pod is, or is to be: a DaemonSet's pod names its node before it is scheduled.
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

// better reports which of two pods on a node is to be asked: while one ends, another may have begun.
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

// pod returns a pod that is on a node.
func (c *cluster) pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	var p corev1.Pod
	if err := c.core.Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(&p); err != nil {
		return nil, failure(err)
	}
	if p.Spec.NodeName == "" {
		return nil, status.Errorf(status.NotFound, "pod %s/%s is on no node yet", namespace, name)
	}
	return &p, nil
}

// pods returns the names of a namespace's pods, for completion.
func (c *cluster) pods(ctx context.Context, namespace string) (names []string) {
	var list corev1.PodList
	_ = c.core.Get().Namespace(namespace).Resource("pods").Do(ctx).Into(&list) // then there are none to propose
	for i := range list.Items {
		names = append(names, list.Items[i].Name)
	}
	return names
}

// failure gives the API server's refusals their exit codes.
func failure(err error) error {
	switch {
	case apierrors.IsNotFound(err):
		return &status.Error{Code: status.NotFound, Err: err}
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return &status.Error{Code: status.NotAllowed, Err: err}
	}
	return err
}

// ask runs probeletctl in a daemon's pod. Its exit code is the error's; what it says on stderr is passed on.
//
// Running it there needs no port, no other privilege on the node, and no right but those that an administrator has already.
// A port that is forwarded would reach only what listens on TCP, so what the daemon tells root on its socket would have to be
// told every process of the node.
func (c *cluster) ask(ctx context.Context, daemon *corev1.Pod, stdout, stderr io.Writer, args ...string) error {
	url := c.core.Post().Namespace(daemon.Namespace).Resource("pods").Name(daemon.Name).SubResource("exec").VersionedParams(
		&corev1.PodExecOptions{Container: container, Command: append([]string{"probeletctl"}, args...), Stdout: true, Stderr: true}, c.codec).URL()
	// As kubectl exec does it: by a web socket, or SPDY where a server or proxy does not know that.
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
			forbidden = true // as "get"; the other way is "create", and its error has no code
		}
		return upgrade != nil || httpstream.IsHTTPSProxyError(err)
	})
	if err != nil {
		return err
	}
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: stdout, Stderr: stderr})
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

// read has probeletctl answer in JSON.
func read[T any](ctx context.Context, c *cluster, daemon *corev1.Pod, args ...string) (reply T, err error) {
	var stdout, stderr bytes.Buffer
	err = c.ask(ctx, daemon, &stdout, &stderr, append(args, "-o", "json")...)
	if json.Unmarshal(stdout.Bytes(), &reply) == nil {
		return reply, nil // what it ended with is in there, too
	}
	if said := strings.TrimSpace(stderr.String()); err != nil && said != "" {
		err = errors.New(said)
	}
	if err == nil {
		err = fmt.Errorf("probeletctl says %.100q, which is not understood", stdout.String())
	}
	return reply, err
}

// trouble says what is wrong with a daemon's pod, as far as the API server knows; empty: nothing. asked: it can be asked for more.
func trouble(p *corev1.Pod) (why string, asked bool) {
	if p.DeletionTimestamp != nil {
		return "the pod is ending", false
	}
	for _, s := range p.Status.InitContainerStatuses {
		if why := waiting(s); why != "" && !s.Ready {
			return "container " + s.Name + ": " + why, false
		}
	}
	for _, s := range p.Status.ContainerStatuses {
		switch why := waiting(s); {
		case s.Name == "uninstalled":
			return "probelet was taken off the node", false
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

// waiting says why a container does not run; empty: it does, or has ended well.
func waiting(s corev1.ContainerStatus) string {
	var said []string
	if w := s.State.Waiting; w != nil {
		said = append(said, strings.TrimSuffix(w.Reason+": "+w.Message, ": "))
	}
	for _, t := range []*corev1.ContainerStateTerminated{s.State.Terminated, s.LastTerminationState.Terminated} {
		if t != nil && t.ExitCode != 0 && s.State.Running == nil {
			said = append(said, strings.TrimSuffix(fmt.Sprintf("ended with %d: %s", t.ExitCode, cmp.Or(t.Message, t.Reason)), ": "))
		}
	}
	return strings.Join(said, "; ")
}
