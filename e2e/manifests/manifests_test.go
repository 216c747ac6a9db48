package manifests_test

import (
	"cmp"
	"flag"
	"maps"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"github.com/probelet/probelet/e2e/harness/image"
	"github.com/probelet/probelet/e2e/harness/manifests"
)

var update = flag.Bool("update", false, "write the rendered chart to cni-conf/kustomize")

const (
	chart     = "../../cni-conf/helm/probelet"
	kustomize = "../../cni-conf/kustomize"
)

func render(t *testing.T, values map[string]any) []runtime.Object {
	t.Helper()
	text, err := manifests.Render(chart, "probelet", "probelet", withImage(values))
	if err != nil {
		t.Fatal(err)
	}
	objects, err := manifests.Decode(text)
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// one returns the only object of a type.
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

// environment returns the variables of the daemon's container. They must be in the pod template itself: one kept in a ConfigMap can
// be stale when the pod starts.
func environment(t *testing.T, objects []runtime.Object) map[string]string {
	t.Helper()
	container := daemonSet(t, objects).Spec.Template.Spec.Containers[0]
	if len(container.EnvFrom) > 0 {
		t.Fatalf("container %s has variables from elsewhere: %+v", container.Name, container.EnvFrom)
	}
	variables := map[string]string{}
	for _, v := range container.Env {
		if _, twice := variables[v.Name]; twice {
			t.Errorf("container %s has variable %s twice", container.Name, v.Name)
		}
		variables[v.Name] = v.Value
	}
	return variables
}

// daemonSet returns the daemon's DaemonSet.
func daemonSet(t *testing.T, objects []runtime.Object) *appsv1.DaemonSet {
	t.Helper()
	return named(t, objects, "probelet")
}

func named(t *testing.T, objects []runtime.Object, name string) *appsv1.DaemonSet {
	t.Helper()
	for _, o := range objects {
		if set, ok := o.(*appsv1.DaemonSet); ok && set.Name == name {
			return set
		}
	}
	t.Fatalf("no DaemonSet %s", name)
	return nil
}

func TestChartLint(t *testing.T) {
	for _, message := range lint.RunAll(chart, nil, "probelet").Messages {
		if message.Severity > support.InfoSev {
			t.Error(message)
		}
	}
}

// with parses values in the syntax of values.yaml, and adds an image.
func with(t *testing.T, text string) map[string]any {
	t.Helper()
	values := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &values); err != nil {
		t.Fatal(err)
	}
	return withImage(values)
}

// withImage adds the name of an image if there is none.
func withImage(values map[string]any) map[string]any {
	repository, _, _ := strings.Cut(image.Reference, ":")
	all := map[string]any{"image": map[string]any{"repository": repository}}
	maps.Copy(all, values)
	return all
}

// variants are values that users are likely to set.
var variants = map[string]string{
	"defaults":     "",
	"answer":       "{mode: answer, config: {staleness-ceiling: 2, metrics-per-pod: true, refresh: 500ms}}",
	"off":          `mode: "off"`,
	"API server":   "source: apiserver",
	"old kubelets": "rbac: {nodesProxy: true}",
	"uninstall":    "uninstall: true",
	"SELinux":      "seLinuxOptions: {type: spc_t}",
	"XDP":          "hook: xdp",
	"all sorts": `{podLabels: {a: b}, podAnnotations: {a: b}, imagePullSecrets: [{name: x}], affinity: {nodeAffinity: {}},
		cni: {netDir: /net, binDir: /bin, chain: copy}, stateDir: /state, bpffs: /bpf, nodeSelector: {a: b}, priorityClassName: "",
		updateStrategy: {rollingUpdate: {maxUnavailable: 1}}}`,
	"PodMonitor": `{podMonitor: {enabled: true, labels: {release: x}}, prometheusRule: {enabled: true, labels: {release: prom}}}`,
	"no events":  "config: {events: false, log-format: json}",
	"root-dir":   "{kubeletDir: /var/lib/k0s/kubelet, config: {crosscheck: 30s}}",
	"k3s":        "platform: k3s",
	"OpenShift":  "platform: openshift",
	"reachable":  `{metrics: {listen: "[::]:1234"}}`,
}

func TestVariants(t *testing.T) {
	for name, values := range variants {
		t.Run(name, func(t *testing.T) { render(t, with(t, values)) })
	}
}

func TestRefusedValues(t *testing.T) {
	for values, want := range map[string]string{
		`image: {repository: ""}`:          "helm upgrade --reset-then-reuse-values",
		"platform: eks-anywhere":           "platform",
		"mode: on":                         "mode",
		"mode: off":                        `must be quoted if it is "off"`,
		"moed: answer":                     "moed",
		"stateDir: run":                    "stateDir",
		"hook: tcx":                        "hook",
		"config: {hook: xdp}":              "hook",
		"config: {stalenes: 2}":            "stalenes",
		"config: {mode: answer}":           "mode",
		"config: {cni-net-dir: /x}":        "cni-net-dir",
		"config: {metrics-listen: ':1'}":   "metrics-listen",
		"updateStrategy: {type: OnDelete}": "type",
		"updateStrategy: {rollingUpdate: {maxSurge: 1, maxUnavailable: 0}}": "maxSurge",
	} {
		if _, err := manifests.Render(chart, "probelet", "probelet", with(t, values)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", values, err, want)
		}
	}
}

// An API server too old for this permission would accept it, but the kubelets would still refuse the daemon.
func TestOldClusters(t *testing.T) {
	for version, test := range map[string]struct{ values, fails, notes string }{
		"v1.32.9": {"", "rbac.nodesProxy=true", ""},
		"v1.32.8": {"rbac: {nodesProxy: true}", "", "mode is observe"},
		"v1.32.7": {"source: apiserver", "", "mode is observe"},
		"v1.32.6": {"uninstall: true", "", "rollout status daemonset/probelet"},
		"v1.33.1": {"", "", "Kubelets before 1.33"},
		"v1.36.1": {"", "", "mode is observe"},
	} {
		files, err := manifests.Files(chart, "probelet", "probelet", with(t, test.values), version)
		if test.fails != "" {
			if err == nil || !strings.Contains(err.Error(), test.fails) {
				t.Errorf("%s: %v", version, err)
			}
			continue
		}
		notes := files["probelet/templates/NOTES.txt"]
		if err != nil || !strings.Contains(notes, test.notes) {
			t.Errorf("%s: %v, %s", version, err, notes)
		}
		if version == "v1.36.1" && strings.Contains(notes, "Kubelets before") {
			t.Errorf("%s: %s", version, notes)
		}
	}
}

// capabilities lists all capabilities of each container.
var capabilities = map[string][]corev1.Capability{
	"install":     {"DAC_OVERRIDE", "CHOWN", "SYS_PTRACE"},
	"probeletd":   {"BPF", "NET_ADMIN", "PERFMON", "DAC_OVERRIDE", "CHOWN", "SYS_PTRACE"},
	"uninstall":   {"BPF", "NET_ADMIN", "DAC_OVERRIDE", "SYS_PTRACE"},
	"uninstalled": nil,
}

// The pods run with few privileges, all of which are listed here.
func TestLeastPrivileges(t *testing.T) {
	for name, values := range variants {
		t.Run(name, func(t *testing.T) {
			set := daemonSet(t, render(t, with(t, values)))
			if !maps.Equal(set.Spec.Selector.MatchLabels, map[string]string{
				"app.kubernetes.io/name": "probelet", "app.kubernetes.io/instance": "probelet",
			}) {
				t.Errorf("selector: %s", set.Spec.Selector.MatchLabels)
			}
			for label, value := range set.Spec.Selector.MatchLabels {
				if set.Spec.Template.Labels[label] != value {
					t.Errorf("the selector does not select the pods: %s", set.Spec.Template.Labels)
				}
			}
			expectPod(t, set.Spec.Template.Spec)
			for _, c := range slices.Concat(set.Spec.Template.Spec.InitContainers, set.Spec.Template.Spec.Containers) {
				expectContainer(t, c)
			}
		})
	}
}

func expectPod(t *testing.T, spec corev1.PodSpec) {
	t.Helper()
	// The daemon looks at the processes of the kubelet and the runtime, but needs no access to IPC.
	if !spec.HostNetwork || !spec.HostPID || spec.HostIPC || spec.HostUsers != nil || spec.SecurityContext != nil {
		t.Errorf("network %t, PID %t, IPC %t, %+v", spec.HostNetwork, spec.HostPID, spec.HostIPC, spec.SecurityContext)
	}
	containers := slices.Concat(spec.InitContainers, spec.Containers)
	for _, v := range spec.Volumes {
		// If the CNI directories do not exist, they must not be created: the runtime uses others.
		if made := v.HostPath != nil && *v.HostPath.Type == corev1.HostPathDirectoryOrCreate; made && strings.HasPrefix(v.Name, "cni-") {
			t.Errorf("volume %s: would be created", v.Name)
		}
		if v.HostPath == nil || *v.HostPath.Type == corev1.HostPathUnset {
			t.Errorf("volume %s: %+v", v.Name, v)
		}
		if !slices.ContainsFunc(containers, func(c corev1.Container) bool { return mounts(c, v.Name) }) {
			t.Errorf("volume %s: not mounted", v.Name)
		}
	}
	for _, c := range containers {
		for _, m := range c.VolumeMounts {
			i := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name })
			if i < 0 {
				t.Fatalf("%s mounts %s, which is not a volume", c.Name, m.Name)
			}
			if path := spec.Volumes[i].HostPath.Path; path != m.MountPath && m.Name != "cgroup" {
				t.Errorf("%s: %s is at %s", c.Name, path, m.MountPath)
			}
			if m.Name == "cgroup" && !m.ReadOnly {
				t.Error("the host's cgroups are mounted writable")
			}
		}
	}
}

func mounts(c corev1.Container, volume string) bool {
	return slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == volume })
}

func expectContainer(t *testing.T, c corev1.Container) {
	t.Helper()
	s := c.SecurityContext
	if s.Privileged != nil || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || *s.RunAsUser != 0 || s.ProcMount != nil {
		t.Errorf("%s: %+v", c.Name, s)
	}
	if s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("%s: seccomp %+v", c.Name, s.SeccompProfile)
	}
	want, known := capabilities[c.Name]
	if !known || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || !slices.Equal(s.Capabilities.Add, want) {
		t.Errorf("%s: capabilities %+v, want %s", c.Name, s.Capabilities, want)
	}
	if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() || c.Resources.Limits.Memory().IsZero() {
		t.Errorf("%s: resources %+v", c.Name, c.Resources)
	}
}

// The kubelet socket in the daemon's configuration is in a mounted directory, unless the daemon does not need it.
func TestPodsAPISocket(t *testing.T) {
	for name, want := range map[string]string{
		"defaults": "/var/lib/kubelet/pods-api", "root-dir": "/var/lib/k0s/kubelet/pods-api", "API server": "", "uninstall": "",
	} {
		objects := render(t, with(t, variants[name]))
		spec := daemonSet(t, objects).Spec.Template.Spec
		mounted := ""
		for _, m := range spec.Containers[0].VolumeMounts {
			if m.Name == "pods-api" && m.ReadOnly {
				mounted = m.MountPath
			}
		}
		socket := environment(t, objects)["PROBELET_KUBELET_PODS_SOCKET"]
		if mounted != want || want != "" && socket != want+"/pods-api.sock" {
			t.Errorf("%s: mounts %q, configured with %q; want %q", name, mounted, socket, want)
		}
	}
}

func TestPermissions(t *testing.T) {
	ofKubelet := rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/pods"}, Verbs: []string{"get"}}
	ofOld := rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/proxy"}, Verbs: []string{"get"}}
	ofServer := rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"list", "watch"}}
	verdicts := rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"nodes/metrics"}, Verbs: []string{"get"}}
	events := rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"events"}, Verbs: []string{"create"}}
	for name, values := range variants {
		want := []rbacv1.PolicyRule{ofKubelet, verdicts, events}
		switch name {
		case "API server":
			want = []rbacv1.PolicyRule{ofServer, verdicts, events}
		case "old kubelets":
			want = []rbacv1.PolicyRule{ofKubelet, ofOld, verdicts, events}
		case "no events":
			want = []rbacv1.PolicyRule{ofKubelet, verdicts}
		}
		objects := render(t, with(t, values))
		if rules := one[*rbacv1.ClusterRole](t, objects).Rules; !reflect.DeepEqual(rules, want) {
			t.Errorf("%s: %+v", name, rules)
		}
		account := one[*corev1.ServiceAccount](t, objects)
		binding := one[*rbacv1.ClusterRoleBinding](t, objects)
		subjects := []rbacv1.Subject{{Kind: "ServiceAccount", Name: account.Name, Namespace: account.Namespace}}
		if !reflect.DeepEqual(binding.Subjects, subjects) || binding.RoleRef.Name != one[*rbacv1.ClusterRole](t, objects).Name {
			t.Errorf("%s: %+v", name, binding)
		}
	}
}

// "helm uninstall" alone removes probelet from the nodes, in the same way as uninstall=true, after the daemon is gone.
func TestUninstallHooks(t *testing.T) {
	for name, values := range variants {
		t.Run(name, func(t *testing.T) {
			text, err := manifests.RenderHooks(chart, "probelet", "probelet", with(t, values))
			if err != nil {
				t.Fatal(err)
			}
			objects, err := manifests.Decode(text)
			if err != nil {
				t.Fatal(err)
			}
			var weights []int
			for _, o := range objects {
				annotations := o.(metav1.Object).GetAnnotations()
				weight, err := strconv.Atoi(annotations["helm.sh/hook-weight"])
				if annotations["helm.sh/hook"] != "post-delete" || err != nil {
					t.Errorf("%T: %s", o, annotations)
				}
				weights = append(weights, weight)
			}
			if !slices.IsSorted(weights) || len(weights) != 5 {
				t.Errorf("weights %d", weights)
			}
			set, job := one[*appsv1.DaemonSet](t, objects), one[*batchv1.Job](t, objects)
			expectPod(t, set.Spec.Template.Spec)
			for _, c := range slices.Concat(set.Spec.Template.Spec.InitContainers, set.Spec.Template.Spec.Containers) {
				expectContainer(t, c)
			}
			want := daemonSet(t, render(t, with(t, variants["uninstall"]))).Spec.Template.Spec
			if name == "defaults" && !reflect.DeepEqual(set.Spec.Template.Spec, want) {
				t.Errorf("the pods are\n%+v\nwith uninstall=true\n%+v", set.Spec.Template.Spec, want)
			}
			if !maps.Equal(set.Spec.Selector.MatchLabels, set.Spec.Template.Labels) {
				t.Errorf("selector %s, labels %s", set.Spec.Selector.MatchLabels, set.Spec.Template.Labels)
			}
			if maps.Equal(set.Spec.Selector.MatchLabels, daemonSet(t, render(t, with(t, values))).Spec.Selector.MatchLabels) {
				t.Error("the selector matches the daemon's pods")
			}
			if args := job.Spec.Template.Spec.Containers[0].Args; !slices.Equal(args, []string{"wait", "--daemonset", set.Namespace + "/" + set.Name}) {
				t.Errorf("wait has arguments %q", args)
			}
			role := one[*rbacv1.Role](t, objects)
			if len(role.Rules) != 1 || !slices.Equal(role.Rules[0].ResourceNames, []string{set.Name}) || !slices.Equal(role.Rules[0].Verbs, []string{"get"}) {
				t.Errorf("permissions %+v", role.Rules)
			}
			if account := job.Spec.Template.Spec.ServiceAccountName; account != one[*corev1.ServiceAccount](t, objects).Name || account != one[*rbacv1.RoleBinding](t, objects).Subjects[0].Name {
				t.Errorf("account %s", account)
			}
		})
	}
}

func TestSafeFirstStep(t *testing.T) {
	if mode := environment(t, render(t, nil))["PROBELET_MODE"]; mode != "observe" {
		t.Errorf("the default mode is %s, want observe", mode)
	}
}

// install, which first writes the plugin's configuration, and the daemon, which maintains it, use the same hook.
func TestHook(t *testing.T) {
	for values, want := range map[string]string{"": "tc", "hook: xdp": "xdp"} {
		objects := render(t, with(t, values))
		if got := environment(t, objects)["PROBELET_HOOK"]; got != want {
			t.Errorf("the daemon has %q, want %s", got, want)
		}
		args := daemonSet(t, objects).Spec.Template.Spec.InitContainers[0].Args
		if !slices.Contains(args, "--hook="+want) {
			t.Errorf("install has %s, want %s", args, want)
		}
	}
}

// A platform sets its directories, unless they are given. Directories that do not exist are not created.
func TestPlatforms(t *testing.T) {
	text, err := os.ReadFile(chart + "/platforms.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var platforms map[string]struct {
		NetDir, BinDir string
		SELinuxOptions corev1.SELinuxOptions
	}
	if err := yaml.UnmarshalStrict(text, &platforms); err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile("../../docs/platforms.md")
	if err != nil {
		t.Fatal(err)
	}
	expect := func(values, netDir, binDir string) {
		t.Helper()
		objects := render(t, with(t, values))
		data := environment(t, objects)
		if data["PROBELET_CNI_NET_DIR"] != netDir || data["PROBELET_CNI_BIN_DIR"] != binDir {
			t.Errorf("%s: %s", values, data)
		}
		types := map[string]corev1.HostPathType{}
		for _, v := range daemonSet(t, objects).Spec.Template.Spec.Volumes {
			types[v.HostPath.Path] = *v.HostPath.Type
		}
		if types[netDir] != corev1.HostPathDirectory || types[binDir] != corev1.HostPathDirectory {
			t.Errorf("%s: %s", values, types)
		}
	}
	for name, p := range platforms {
		netDir, binDir := cmp.Or(p.NetDir, "/etc/cni/net.d"), cmp.Or(p.BinDir, "/opt/cni/bin")
		expect("platform: "+name, netDir, binDir)
		expect("{platform: "+name+", cni: {binDir: /mine}}", netDir, "/mine")
		row := regexp.MustCompile("(?m)^\\| [^|]+ \\| `" + name + "` \\| `" + netDir + "` \\| `" + binDir + "` \\|").Find(table)
		if row == nil {
			t.Errorf("docs/platforms.md has no row for %s with %s and %s", name, netDir, binDir)
		}
	}
	expect("", "/etc/cni/net.d", "/opt/cni/bin")
}

// probeletctl gets the directories from the environment of the daemon's container.
func TestDirectories(t *testing.T) {
	objects := render(t, with(t, variants["all sorts"]))
	variables := environment(t, objects)
	for name, want := range map[string]string{
		"PROBELET_CNI_NET_DIR": "/net", "PROBELET_CNI_BIN_DIR": "/bin", "PROBELET_STATE_DIR": "/state", "PROBELET_BPF_DIR": "/bpf/probelet",
	} {
		if variables[name] != want {
			t.Errorf("%s is %q, want %s", name, variables[name], want)
		}
	}
}

// The daemon's probes and the PodMonitor use the port that the daemon listens on.
func TestPorts(t *testing.T) {
	for name, values := range variants {
		objects := render(t, with(t, values))
		daemon := daemonSet(t, objects).Spec.Template.Spec.Containers[0]
		if daemon.Name != "probeletd" {
			continue
		}
		host, port, err := net.SplitHostPort(environment(t, objects)["PROBELET_METRICS_LISTEN"])
		if err != nil {
			t.Fatal(err)
		}
		local := host == "127.0.0.1"
		if !local {
			host = "" // the pod's address, which is the node's
		}
		for path, probe := range map[string]*corev1.Probe{"/healthz": daemon.LivenessProbe, "/readyz": daemon.ReadinessProbe} {
			if get := probe.HTTPGet; get.Path != path || get.Port.String() != port || get.Host != host {
				t.Errorf("%s: %+v", name, get)
			}
		}
		if local != (len(daemon.Ports) == 0) {
			t.Errorf("%s: ports %+v", name, daemon.Ports)
		}
		for _, p := range daemon.Ports {
			if strconv.Itoa(int(p.ContainerPort)) != port || p.HostPort != p.ContainerPort {
				t.Errorf("%s: %+v, want port %s", name, p, port)
			}
		}
	}
}

// Prometheus scrapes pods with their own network, which have no access to the node.
func TestPodMonitor(t *testing.T) {
	objects := render(t, with(t, variants["PodMonitor"]))
	m, set := one[*monitoringv1.PodMonitor](t, objects), named(t, objects, "probelet-metrics")
	if m.Labels["release"] != "x" || !maps.Equal(m.Spec.Selector.MatchLabels, set.Spec.Template.Labels) || len(m.Spec.PodMetricsEndpoints) != 1 {
		t.Fatalf("%+v", m)
	}
	pod := set.Spec.Template.Spec
	port := m.Spec.PodMetricsEndpoints[0].Port
	if port == nil || !slices.ContainsFunc(pod.Containers[0].Ports, func(p corev1.ContainerPort) bool { return p.Name == *port && p.HostPort == 0 }) {
		t.Errorf("no container has the port of %+v", m.Spec.PodMetricsEndpoints[0])
	}
	relabeled := m.Spec.PodMetricsEndpoints[0].RelabelConfigs
	if job := relabeled[len(relabeled)-1]; job.TargetLabel != "job" || *job.Replacement != "probelet" { // as in the alerts
		t.Errorf("%+v", relabeled)
	}
	if pod.HostNetwork || pod.HostPID || *pod.AutomountServiceAccountToken || len(pod.Volumes) != 1 {
		t.Errorf("%+v", pod)
	}
	s := pod.Containers[0].SecurityContext
	if !*s.RunAsNonRoot || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || pod.Volumes[0].HostPath.Path != "/run/probelet/metrics" {
		t.Errorf("%+v, %+v", s, pod.Volumes)
	}
	if len(s.Capabilities.Add) > 0 || !*s.ReadOnlyRootFilesystem || *s.AllowPrivilegeEscalation || !pod.Containers[0].VolumeMounts[0].ReadOnly {
		t.Errorf("%+v", s)
	}
	if listen := environment(t, objects)["PROBELET_METRICS_LISTEN"]; !strings.HasPrefix(listen, "127.0.0.1:") {
		t.Errorf("the daemon listens on %s, want a loopback address", listen)
	}
}

// The alerts are valid PromQL about existing metrics and labels, and each has a runbook.
func TestAlerts(t *testing.T) {
	rule := one[*monitoringv1.PrometheusRule](t, render(t, with(t, variants["PodMonitor"])))
	if rule.Labels["release"] != "prom" || len(rule.Spec.Groups) != 1 {
		t.Fatalf("%+v", rule)
	}
	metrics := documented(t)
	metrics["up"] = []string{"instance", "job"}
	pages, err := filepath.Glob("../../docs/runbooks/*.md")
	if err != nil {
		t.Fatal(err)
	}
	if len(pages) != len(rule.Spec.Groups[0].Rules) || len(pages) < 9 {
		t.Errorf("%d pages for %d alerts", len(pages), len(rule.Spec.Groups[0].Rules))
	}
	for _, r := range rule.Spec.Groups[0].Rules {
		expectQuery(t, r.Alert, r.Expr.String(), "", metrics)
		page := "docs/runbooks/" + r.Alert + ".md"
		if !strings.HasSuffix(r.Annotations["runbook_url"], page) {
			t.Errorf("%s: %s", r.Alert, r.Annotations["runbook_url"])
		}
		text, err := os.ReadFile("../../" + page)
		if err != nil || !strings.Contains(string(text), r.Expr.String()) || !strings.HasPrefix(string(text), "# "+r.Alert+"\n") {
			t.Errorf("%s: the runbook does not match: %v", r.Alert, err)
		}
		for _, label := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(r.Annotations["summary"], -1) {
			expectQuery(t, r.Alert, r.Expr.String(), "{{"+label[1]+"}}", metrics)
		}
		if r.For == nil || r.Labels["severity"] == "" || err == nil && !strings.Contains(string(text), "for "+string(*r.For)+", severity "+r.Labels["severity"]+"\n") {
			t.Errorf("%+v", r)
		}
	}
}

// Typos are errors, also in custom resources.
func TestDecodeIsStrict(t *testing.T) {
	for text, want := range map[string]string{
		"apiVersion: v1\nkind: Pod\nspec: {hostNetwrk: true}":                                                    "hostNetwrk",
		"apiVersion: v1\nkind: Pod\nspec: {hostPID: true, hostPID: true}":                                        "hostPID",
		"apiVersion: monitoring.coreos.com/v1\nkind: PodMonitor\nspec: {podMetricsEndpoints: [{prot: metrics}]}": "prot",
		"apiVersion: monitoring.coreos.com/v1\nkind: PodMoniter":                                                 "no kind",
	} {
		if _, err := manifests.Decode(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// The kustomize bases match the chart.
func TestKustomize(t *testing.T) {
	for dir, values := range map[string]map[string]any{"base": nil, "answer": {"mode": "answer"}, "uninstall": {"uninstall": true}} {
		text, err := manifests.Render(chart, "probelet", "probelet", withImage(values))
		if err != nil {
			t.Fatal(err)
		}
		text = "# Rendered from the Helm chart: cd e2e && go test ./manifests -update\n" + text
		file := filepath.Join(kustomize, dir, "probelet.yaml")
		if *update {
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != text {
			t.Errorf("%s differs from the chart (run with -update): %v", file, err)
		}
		objects := build(t, filepath.Join(kustomize, dir))
		// Without this label, the namespace would refuse pods that use the host's network and see its processes.
		if n := one[*corev1.Namespace](t, objects); n.Labels["pod-security.kubernetes.io/enforce"] != "privileged" {
			t.Errorf("namespace: %s", n.Labels)
		}
		spec := daemonSet(t, objects).Spec.Template.Spec
		terms := one[*corev1.ResourceQuota](t, objects).Spec.ScopeSelector.MatchExpressions
		if len(terms) != 1 || !slices.Equal(terms[0].Values, []string{spec.PriorityClassName}) {
			t.Errorf("the quota applies to %+v", terms)
		}
	}
}

func build(t *testing.T, dir string) []runtime.Object {
	t.Helper()
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := built.AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	objects, err := manifests.Decode(string(whole))
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// The commands in the documentation build, push and deploy the same image, with a version and a tag of its own (nodes do not pull a tag
// again that they have), and uninstall in the same way everywhere.
func TestCommands(t *testing.T) {
	const tag = "$TAG"
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	pages = append(pages, "../../README.md")
	build, found := "docker build --build-arg VERSION="+tag+" -t YOUR_REGISTRY/probelet:"+tag, 0
	for _, name := range append(pages, "../../cni-conf/README.md", chart+"/values.yaml", chart+"/templates/NOTES.txt") {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		found += strings.Count(string(text), build)
		for _, built := range regexp.MustCompile(`YOUR_REGISTRY/probelet(?::| --set(?:-string)? image.tag=)?(\S*)`).FindAllStringSubmatch(string(text), -1) {
			if built[1] != tag {
				t.Errorf("%s: %s, want the tag %s", name, built[0], tag)
			}
		}
		if strings.Contains(string(text), "--set image.tag=") {
			t.Errorf("%s: --set would make a number of a tag that has only digits", name)
		}
		for _, path := range regexp.MustCompile(`cni-conf/(?:helm|kustomize)/[\w./]*\w`).FindAllString(string(text), -1) {
			if _, err := os.Stat(filepath.Join("../..", path)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if strings.Contains(string(text), "--reuse-values") || strings.Contains(string(text), "upgrade … --set") {
			t.Errorf("%s: a command would reset other values, or miss new ones", name)
		}
		for _, wanted := range []string{"--reset-then-reuse-values --set uninstall=true\n", "--reset-then-reuse-values --set mode=answer\n", "rollout status daemonset/"} {
			if !slices.Contains(pages, name) && !strings.Contains(string(text), wanted) {
				t.Errorf("%s does not contain %q", name, wanted)
			}
		}
	}
	if found < 2 {
		t.Errorf("the documentation contains %q %d times", build, found)
	}
}

// A custom image is named in one place.
func TestKustomizedImage(t *testing.T) {
	copied := t.TempDir()
	if err := os.CopyFS(copied, os.DirFS(kustomize)); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(copied, "image/kustomization.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	mine := strings.NewReplacer("newName: registry.example/probelet", "newName: mine.example/p", "newTag: dev", "newTag: v7").Replace(string(text))
	if err := os.WriteFile(file, []byte(mine), 0o644); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{kustomize: image.Reference, copied: "mine.example/p:v7"} {
		for _, base := range []string{"base", "answer", "uninstall"} {
			spec := daemonSet(t, build(t, filepath.Join(dir, base))).Spec.Template.Spec
			for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
				if c.Image != want {
					t.Errorf("%s: %s has image %s, want %s", base, c.Name, c.Image, want)
				}
			}
		}
	}
}
