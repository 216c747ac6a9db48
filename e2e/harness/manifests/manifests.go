// Package manifests renders the Helm chart and decodes Kubernetes objects as strictly as the API server does.
package manifests

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

// kubernetes is the version that the tests use (go.mod).
const kubernetes = "v1.37.2"

// Render returns what "helm template NAME CHART --namespace NAMESPACE --no-hooks" prints, except for the notes.
func Render(chartDir, name, namespace string, values map[string]any) (string, error) {
	files, err := Files(chartDir, name, namespace, values, kubernetes)
	if err != nil {
		return "", err
	}
	delete(files, filepath.Join("probelet", "templates", hooks))
	var text strings.Builder
	for _, file := range slices.Sorted(maps.Keys(files)) {
		if filepath.Ext(file) == ".yaml" && strings.TrimSpace(files[file]) != "" {
			fmt.Fprintf(&text, "---\n%s\n", strings.TrimSpace(files[file]))
		}
	}
	return text.String(), nil
}

// hooks is the template of the objects that Helm creates when it uninstalls a release.
const hooks = "hooks.yaml"

// RenderHooks returns the objects that Helm creates when it uninstalls a release.
func RenderHooks(chartDir, name, namespace string, values map[string]any) (string, error) {
	files, err := Files(chartDir, name, namespace, values, kubernetes)
	return files[filepath.Join("probelet", "templates", hooks)], err
}

// Files returns the chart's templates, rendered for a cluster of this version.
func Files(chartDir, name, namespace string, values map[string]any, version string) (map[string]string, error) {
	chart, err := loader.Load(chartDir)
	if err != nil {
		return nil, err
	}
	kube, err := common.ParseKubeVersion(version)
	if err != nil {
		return nil, err
	}
	options := common.ReleaseOptions{Name: name, Namespace: namespace, Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(chart, values, options, &common.Capabilities{KubeVersion: *kube})
	if err != nil {
		return nil, err
	}
	return engine.Render(chart, all)
}

// Decode decodes YAML documents. Unknown fields, unknown kinds and duplicate fields are errors.
func Decode(text string) ([]runtime.Object, error) {
	known := runtime.NewScheme()
	if err := errors.Join(scheme.AddToScheme(known), monitoringv1.AddToScheme(known)); err != nil {
		return nil, err
	}
	strict := serializer.NewCodecFactory(known, serializer.EnableStrict).UniversalDeserializer()
	reader := yaml.NewDocumentDecoder(io.NopCloser(strings.NewReader(text)))
	defer reader.Close() //nolint:errcheck // read only
	var objects []runtime.Object
	buffer := make([]byte, 1<<20)
	for {
		n, err := reader.Read(buffer)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		document := bytes.TrimSpace(buffer[:n])
		if len(document) == 0 {
			continue
		}
		object, _, err := strict.Decode(document, nil, nil)
		if err != nil {
			return nil, fmt.Errorf("%w in\n%s", err, document)
		}
		objects = append(objects, object)
	}
}
