package estimate

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	kubejson "sigs.k8s.io/json"
	sigsyaml "sigs.k8s.io/yaml"

	"github.com/probelet/probelet/daemon/internal/kubeapi"
	"github.com/probelet/probelet/daemon/internal/podspec"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/table"
)

// Input holds the pods that were read, and the number of other objects by kind.
type Input struct {
	Pods   []Replicated
	Others map[string]int
}

// Replicated is a pod, and how many there are of it.
type Replicated struct {
	corev1.Pod
	Replicas int
}

// Read reads pods as JSON or YAML: any number of documents, each of which is a Pod, a manifest of a workload, or a list as kubectl prints
// it. Errors name the document, the object and the field.
func Read(r io.Reader) (Input, error) {
	in := Input{Others: map[string]int{}}
	next, err := documents(r)
	if err != nil {
		return in, err
	}
	for n := 1; ; n++ {
		text, err := next()
		if errors.Is(err, io.EOF) {
			return in, nil
		}
		if err == nil {
			err = in.document(text)
		}
		if err != nil {
			return in, fmt.Errorf("document %d: %w", n, err)
		}
	}
}

// documents returns a function that returns the next document, as JSON.
func documents(r io.Reader) (func() ([]byte, error), error) {
	b := bufio.NewReader(r)
	for {
		first, err := b.ReadByte()
		if errors.Is(err, io.EOF) {
			return func() ([]byte, error) { return nil, io.EOF }, nil
		}
		if err != nil {
			return nil, err
		}
		if bytes.IndexByte([]byte(" \t\r\n"), first) >= 0 {
			continue
		}
		if err := b.UnreadByte(); err != nil {
			return nil, err
		}
		if first == '{' {
			d := json.NewDecoder(b)
			return func() (text []byte, err error) {
				var raw json.RawMessage
				err = d.Decode(&raw)
				return raw, err
			}, nil
		}
		y := yaml.NewYAMLReader(b)
		return func() ([]byte, error) {
			text, err := y.Read()
			if err != nil {
				return nil, err
			}
			return sigsyaml.YAMLToJSON(text)
		}, nil
	}
}

// head has the fields that all objects share.
type head struct {
	APIVersion string            `json:"apiVersion"`
	Kind       string            `json:"kind"`
	Items      []json.RawMessage `json:"items"`
	Metadata   struct {
		Name         string `json:"name"`
		GenerateName string `json:"generateName"`
		Namespace    string `json:"namespace"`
		UID          string `json:"uid"`
	} `json:"metadata"`
}

// creates reports whether the object is a manifest of a workload whose pods can be counted. A workload that was read from a cluster has a
// UID, and its pods are there as well.
func (h head) creates() bool {
	if h.Metadata.UID != "" {
		return false
	}
	switch group, _, _ := strings.Cut(h.APIVersion, "/"); group + " " + h.Kind {
	case "apps Deployment", "apps ReplicaSet", "apps StatefulSet", "batch Job":
		return true
	}
	return false
}

// workload has the fields that say which pods a workload creates, and how many at a time.
type workload struct {
	Spec struct {
		Replicas    *int32                 `json:"replicas"`
		Parallelism *int32                 `json:"parallelism"`
		Completions *int32                 `json:"completions"`
		Template    corev1.PodTemplateSpec `json:"template"`
	} `json:"spec"`
}

func (w workload) pods() (Replicated, error) {
	n := ptr.Deref(w.Spec.Replicas, ptr.Deref(w.Spec.Parallelism, 1))
	n = min(n, ptr.Deref(w.Spec.Completions, n))
	if n < 0 {
		return Replicated{}, fmt.Errorf("spec: %d pods: must not be negative", n)
	}
	template := w.Spec.Template
	return Replicated{corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec}, int(n)}, nil
}

func (in *Input) document(text []byte) error {
	if text = bytes.TrimSpace(text); len(text) == 0 || bytes.Equal(text, []byte("null")) {
		return nil
	}
	h, err := decode[head](text)
	if err != nil {
		return err
	}
	switch h.Kind {
	case "List", "PodList":
		for i, item := range h.Items {
			one, err := decode[head](item)
			if err == nil && h.Kind == "PodList" {
				one.Kind = cmp.Or(one.Kind, "Pod") // the API server's lists do not repeat it
			}
			if err == nil {
				err = in.object(one, item)
			}
			if err != nil {
				return fmt.Errorf("items[%d]: %w", i, err)
			}
		}
		return nil
	}
	return in.object(h, text)
}

// object adds pods, or counts another object.
func (in *Input) object(h head, text []byte) error {
	isPod, kind := h.Kind == "Pod", table.Printable(h.Kind)
	switch {
	case h.Kind == "":
		return errors.New("kind: missing")
	case !isPod && !h.creates():
		in.Others[kind]++
		return nil
	}
	name := cmp.Or(h.Metadata.Name, strings.TrimRight(h.Metadata.GenerateName, "-."))
	if name == "" {
		return errors.New("metadata.name: missing")
	}
	namespace := cmp.Or(h.Metadata.Namespace, corev1.NamespaceDefault)
	if err := cmp.Or(dnsName("metadata.name", name), dnsName("metadata.namespace", namespace)); err != nil {
		return err
	}
	pods, err := decodePods(text, isPod)
	if err == nil {
		pods.Name, pods.Namespace = name, namespace
		err = check(&pods.Pod)
	}
	if err != nil {
		return fmt.Errorf("%s %s/%s: %w", strings.ToLower(h.Kind), namespace, name, err)
	}
	if pods.Replicas == 0 {
		in.Others[kind]++
		return nil
	}
	in.Pods = append(in.Pods, pods)
	return nil
}

func decodePods(text []byte, isPod bool) (Replicated, error) {
	if isPod {
		pod, err := decode[corev1.Pod](text)
		return Replicated{pod, 1}, err
	}
	w, err := decode[workload](text)
	if err != nil {
		return Replicated{}, err
	}
	return w.pods()
}

// check returns an error for what the API server would reject and the estimate needs.
func check(p *corev1.Pod) error {
	errs := []error{dnsName("spec.nodeName", p.Spec.NodeName)}
	for i := range p.Spec.Containers {
		errs = append(errs, dnsName(fmt.Sprintf("spec.containers[%d].name", i), p.Spec.Containers[i].Name))
	}
	for i := range p.Spec.InitContainers {
		errs = append(errs, dnsName(fmt.Sprintf("spec.initContainers[%d].name", i), p.Spec.InitContainers[i].Name))
	}
	if err := cmp.Or(errs...); err != nil {
		return err
	}
	_, err := podspec.Of(p)
	return cmp.Or(errors.Unwrap(err), err) // "not understood" says nothing here
}

// dnsName returns an error for a name that the API server would reject, and that might do anything to a terminal. It accepts an empty name.
func dnsName(field, name string) error {
	if name == "" || len(validation.IsDNS1123Subdomain(name)) == 0 {
		return nil
	}
	return fmt.Errorf("%s: %q: must be a DNS name", field, name)
}

// decode decodes as Kubernetes does: names are case-sensitive, and unknown fields are ignored.
func decode[T any](text []byte) (value T, err error) {
	err = podspec.Mismatch(text, kubejson.UnmarshalCaseSensitivePreserveInts(text, &value))
	return value, err
}

// page is the number of pods per request.
const page = "500"

// List reads the pods of a namespace from the API server, or of all namespaces if it is empty.
func List(ctx context.Context, config *rest.Config, namespace string) (Input, error) {
	var in Input
	core, err := kubeapi.Core(config)
	if err != nil {
		return in, err
	}
	for more := ""; ; {
		var list corev1.PodList
		request := core.Get().Namespace(namespace).Resource("pods").Param("limit", page)
		if more != "" {
			request = request.Param("continue", more)
		}
		if err := request.Do(ctx).Into(&list); err != nil {
			return in, refusal(err, namespace)
		}
		for _, p := range list.Items {
			in.Pods = append(in.Pods, Replicated{p, 1})
		}
		if more = list.Continue; more == "" {
			return in, nil
		}
	}
}

// refusal gives the API server's refusals their exit codes, and adds what to do.
func refusal(err error, namespace string) error {
	if !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err) {
		return err
	}
	instead := "read the output of kubectl get pods -o json with --file, from a person who may list them"
	if namespace == "" {
		instead = "select a namespace whose pods you may list with --namespace, or " + instead
	}
	return status.Errorf(status.NotAllowed, "%w; %s", err, instead)
}

// of keeps the pods of a namespace, or all pods if it is empty.
func (in Input) of(namespace string) Input {
	if namespace != "" {
		in.Pods = slices.DeleteFunc(in.Pods, func(p Replicated) bool { return p.Namespace != namespace })
	}
	return in
}

// others describes the objects that are not pods.
func others(counts map[string]int) string {
	var all []string
	for _, kind := range slices.Sorted(maps.Keys(counts)) {
		all = append(all, fmt.Sprintf("%d of kind %s", counts[kind], kind))
	}
	return strings.Join(all, ", ")
}
