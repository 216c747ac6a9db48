package manifests

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

var update = flag.Bool("update", false, "write what is rendered into cni-conf/kustomize")

const (
	chart     = "../../cni-conf/helm/probelet"
	kustomize = "../../cni-conf/kustomize"
)

func render(t *testing.T, values map[string]any) []runtime.Object {
	t.Helper()
	text, err := Render(chart, "probelet", "probelet", values)
	if err != nil {
		t.Fatal(err)
	}
	objects, err := Decode(text)
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// one is the object of a type.
func one[T runtime.Object](t *testing.T, objects []runtime.Object) T {
	t.Helper()
	var found []T
	for _, o := range objects {
		if object, ok := o.(T); ok {
			found = append(found, object)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d objects %T", len(found), found)
	}
	return found[0]
}

func TestChartIsClean(t *testing.T) {
	for _, message := range lint.RunAll(chart, nil, "probelet").Messages {
		if message.Severity > support.InfoSev {
			t.Error(message)
		}
	}
}

func TestValues(t *testing.T) {
	for name, test := range map[string]struct {
		values map[string]any
		want   string // error; empty: none
	}{
		"defaults":          {nil, ""},
		"answer":            {map[string]any{"mode": "answer", "config": map[string]any{"staleness-ceiling": "2", "metrics-per-pod": true}}, ""},
		"API server":        {map[string]any{"source": "apiserver"}, ""},
		"old kubelets":      {map[string]any{"rbac": map[string]any{"nodesProxy": true}}, ""},
		"uninstall":         {map[string]any{"uninstall": true}, ""},
		"all sorts":         {map[string]any{"podLabels": map[string]any{"a": "b"}, "podAnnotations": map[string]any{"a": "b"}, "imagePullSecrets": []any{map[string]any{"name": "x"}}, "affinity": map[string]any{"nodeAffinity": map[string]any{}}}, ""},
		"PodMonitor":        {map[string]any{"podMonitor": map[string]any{"enabled": true}, "metrics": map[string]any{"listen": ":9553"}}, ""},
		"PodMonitor, local": {map[string]any{"podMonitor": map[string]any{"enabled": true}}, `metrics.listen "127.0.0.1:9553" cannot be reached`},
		"another mode":      {map[string]any{"mode": "on"}, "mode"},
		"misspelt":          {map[string]any{"moed": "answer"}, "moed"},
		"a relative path":   {map[string]any{"stateDir": "run"}, "stateDir"},
	} {
		t.Run(name, func(t *testing.T) {
			text, err := Render(chart, "probelet", "probelet", test.values)
			if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Fatalf("%v, want %q", err, test.want)
			}
			if _, err := Decode(text); err != nil {
				t.Error(err)
			}
		})
	}
}

// What the pods may do is little, and written down here.
func TestLeastPrivileges(t *testing.T) {
	for _, uninstall := range []bool{false, true} {
		set := one[*appsv1.DaemonSet](t, render(t, map[string]any{"uninstall": uninstall}))
		spec := set.Spec.Template.Spec
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			s := c.SecurityContext
			if s.Privileged != nil || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem {
				t.Errorf("%s: %+v", c.Name, s)
			}
			if !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || slices.Contains(s.Capabilities.Add, "SYS_ADMIN") {
				t.Errorf("%s: %+v", c.Name, s.Capabilities)
			}
		}
	}
	rules := one[*rbacv1.ClusterRole](t, render(t, nil)).Rules
	if len(rules) != 1 || !slices.Equal(rules[0].Resources, []string{"nodes/pods"}) || !slices.Equal(rules[0].Verbs, []string{"get"}) {
		t.Errorf("rules: %+v", rules)
	}
	if mode := one[*corev1.ConfigMap](t, render(t, nil)).Data["PROBELET_MODE"]; mode != "observe" {
		t.Errorf("the first step is %s", mode)
	}
}

func TestPodMonitor(t *testing.T) {
	m := one[*unstructured.Unstructured](t, render(t, map[string]any{
		"podMonitor": map[string]any{"enabled": true, "labels": map[string]any{"release": "x"}}, "metrics": map[string]any{"listen": ":9553"},
	}))
	endpoints, _, err := unstructured.NestedSlice(m.Object, "spec", "podMetricsEndpoints")
	if err != nil || len(endpoints) != 1 || m.GetKind() != "PodMonitor" || m.GetLabels()["release"] != "x" {
		t.Errorf("%+v, %v", m, err)
	}
}

// The kustomize bases are what the chart gives.
func TestKustomize(t *testing.T) {
	for dir, values := range map[string]map[string]any{"base": nil, "uninstall": {"uninstall": true}} {
		text, err := Render(chart, "probelet", "probelet", values)
		if err != nil {
			t.Fatal(err)
		}
		text = "# What the Helm chart gives: go test ./manifests -update in e2e/ writes it.\n" + text
		file := filepath.Join(kustomize, dir, "probelet.yaml")
		if *update {
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != text {
			t.Errorf("%s is not what the chart gives (-update writes it): %v", file, err)
		}
		built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join(kustomize, dir))
		if err != nil {
			t.Fatal(err)
		}
		whole, err := built.AsYaml()
		if err != nil {
			t.Fatal(err)
		}
		objects, err := Decode(string(whole))
		if err != nil {
			t.Fatal(err)
		}
		one[*corev1.Namespace](t, objects)
		one[*appsv1.DaemonSet](t, objects)
	}
}
