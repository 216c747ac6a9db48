package source

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	corev1 "k8s.io/api/core/v1"
	kubejson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/probelet/probelet/daemon/internal/podspec"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// filePod is a pod in a specs file.
type filePod struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace,omitempty"` // defaults to "default"
	// IPs are needed if the plugin was not told the pod's name.
	IPs            []string           `json:"ips,omitempty"`
	Annotations    map[string]string  `json:"annotations,omitempty"`
	Containers     []corev1.Container `json:"containers"`
	InitContainers []corev1.Container `json:"initContainers,omitempty"`
}

// settle is the delay between a change and reading the file: editors truncate and write, or remove and rename.
const settle = 50 * time.Millisecond

// File is a YAML file of pods, with containers as in a pod spec:
//
//	pods:
//	- name: web
//	  namespace: shop
//	  ips: [10.0.0.7]
//	  annotations: {probelet.dev/staleness: "2"}
//	  containers:
//	  - name: server
//	    ports: [{name: http, containerPort: 8080}]
//	    readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 5}
type File struct {
	path    string
	log     *slog.Logger
	watcher *fsnotify.Watcher
	initial []probe.Pod
	text    []byte       // as last read, valid or not
	failing atomic.Value // string: the last error logged
}

// NewFile reads the file and starts watching it. Close, or the end of Run, stops watching.
func NewFile(path string, log *slog.Logger) (*File, error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", path, err)
	}
	f := &File{path: path, log: log, watcher: watcher}
	// Watch the directory: a file replaced by a rename is a different file, including behind the symbolic links of a
	// ConfigMap.
	if err := watcher.Add(filepath.Dir(path)); err != nil {
		return nil, errors.Join(fmt.Errorf("watch %s: %w", filepath.Dir(path), err), watcher.Close())
	}
	if f.initial, err = f.read(); err != nil {
		return nil, errors.Join(err, watcher.Close())
	}
	return f, nil
}

// Refresh implements Source. It does nothing, because the file is watched.
func (f *File) Refresh() {}

// Delivery implements Source.
func (*File) Delivery() Delivery {
	return Delivery{Why: "a specs file does not report container states"}
}

// Failing implements Source.
func (f *File) Failing() string {
	failing, _ := f.failing.Load().(string)
	return failing
}

// Close stops watching. It need not be called after Run.
func (f *File) Close() error { return f.watcher.Close() }

// Run implements Source. If the file cannot be read or is invalid, Run logs that and keeps the previous pods.
func (f *File) Run(ctx context.Context, snapshots chan<- []probe.Pod) error {
	defer f.watcher.Close() //nolint:errcheck // nothing is lost
	if !send(ctx, snapshots, f.initial) {
		return nil
	}
	var due <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-f.watcher.Events:
			if !ok {
				return fmt.Errorf("watch %s: %w", f.path, os.ErrClosed)
			}
			if due == nil {
				due = time.After(settle)
			}
		case err := <-f.watcher.Errors:
			f.log.Warn("failed to watch the specs file", "file", f.path, "error", err)
			due = time.After(settle) // events may be lost
		case <-due:
			due = nil
			if pods, changed := f.reload(); changed && !send(ctx, snapshots, pods) {
				return nil
			}
		}
	}
}

var errUnchanged = errors.New("unchanged")

func (f *File) reload() (pods []probe.Pod, changed bool) {
	pods, err := f.read()
	switch {
	case errors.Is(err, errUnchanged):
		return nil, false
	case err != nil:
		if err.Error() != f.Failing() {
			f.log.Error("failed to load specs; keeping the previous ones", "error", err)
		}
		f.failing.Store(err.Error())
		return nil, false
	}
	f.failing.Store("")
	f.log.Info("specs loaded", "file", f.path, "pods", len(pods))
	return pods, true
}

func (f *File) read() ([]probe.Pod, error) {
	text, err := os.ReadFile(f.path)
	if err != nil {
		f.text = nil // when the file comes back, any content is news
		return nil, err
	}
	if f.text != nil && bytes.Equal(text, f.text) {
		return nil, errUnchanged
	}
	f.text = text
	pods, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.path, err)
	}
	return pods, nil
}

// Parse parses a specs file. Errors name the pod, the field and the value.
func Parse(text []byte) ([]probe.Pod, error) {
	var file struct {
		Pods *[]json.RawMessage `json:"pods"`
	}
	raw, err := yaml.YAMLToJSONStrict(text)
	if err == nil {
		err = decodeStrict(raw, &file)
	}
	if err != nil {
		return nil, err
	}
	if file.Pods == nil {
		return nil, errors.New("pods: missing (if there are no pods, write pods: [])")
	}
	var pods []probe.Pod
	var errs []error
	for i, raw := range *file.Pods {
		pod, err := parsePod(raw)
		if err != nil {
			errs = append(errs, fmt.Errorf("pods[%d] (%s): %w", i, pod, err))
			continue
		}
		pods = append(pods, pod)
	}
	return pods, errors.Join(append(errs, duplicates(pods))...)
}

func parsePod(raw []byte) (probe.Pod, error) {
	var in filePod
	err := decodeStrict(raw, &in)
	if in.Namespace == "" {
		in.Namespace = corev1.NamespaceDefault
	}
	named := probe.Pod{Namespace: in.Namespace, Name: in.Name}
	if err != nil {
		return named, err
	}
	if in.Name == "" {
		return named, errors.New("name: missing")
	}
	pod := corev1.Pod{Spec: corev1.PodSpec{Containers: in.Containers, InitContainers: in.InitContainers}}
	pod.Namespace, pod.Name, pod.Annotations = in.Namespace, in.Name, in.Annotations
	for i, text := range in.IPs {
		if _, err := netip.ParseAddr(text); err != nil {
			return named, fmt.Errorf("ips[%d]: %q: not an IP address", i, text)
		}
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: text})
	}
	return podspec.Of(&pod)
}

// decodeStrict rejects unknown fields, and fields whose case differs.
func decodeStrict(raw []byte, into any) error {
	strict, err := kubejson.UnmarshalStrict(raw, into)
	return errors.Join(append(strict, podspec.Mismatch(raw, err))...)
}

func duplicates(pods []probe.Pod) error {
	var errs []error
	names := map[string]bool{}
	owners := map[netip.Addr]string{}
	for _, pod := range pods {
		if names[pod.String()] {
			errs = append(errs, fmt.Errorf("pods: name: %s: must be unique", pod))
		}
		names[pod.String()] = true
		for _, ip := range pod.IPs {
			if owner, taken := owners[ip]; taken {
				errs = append(errs, fmt.Errorf("pods (%s): ips: %s: already used by pod %s", pod, ip, owner))
			}
			owners[ip] = pod.String()
		}
	}
	return errors.Join(errs...)
}
