// Objects that can be turned: <div class="orbit"> with one .pane for each object, all turned together.
// Angles are the reconstructors': degrees, azimuth counter-clockwise from +x seen from above, z up.

async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Chromium starts no module worker from a blob in a page that was opened as a file. Told so at once, gsplat starts its
// workers from data: addresses.
globalThis.Worker = class extends Worker {
  constructor(address, options) {
    if (String(address).startsWith("blob:") && options?.type === "module") throw new TypeError("no module workers from blobs");
    super(address, options);
  }
};

const libraries = {};

function library(kind) {
  libraries[kind] ??= unpack(`viewer-${kind}`).then((code) => {
    const address = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
    return import(address).finally(() => URL.revokeObjectURL(address));
  });
  return libraries[kind];
}

class MeshView {
  constructor(_, pane, bytes, label, changed) {
    this.address = URL.createObjectURL(new Blob([bytes], { type: "model/gltf-binary" }));
    this.element = document.createElement("model-viewer");
    const attributes = {
      "src": this.address, "alt": label, "camera-controls": "", "disable-pan": "", "disable-tap": "",
      "interaction-prompt": "none", "camera-target": "0m 0m 0m", "min-camera-orbit": "-Infinity 1deg 0.5m",
      "max-camera-orbit": "Infinity 179deg 30m", "min-field-of-view": "5deg", "max-field-of-view": "100deg",
      "interpolation-decay": "60", "shadow-intensity": "0", "tone-mapping": "none", "touch-action": "none",
    };
    for (const [name, value] of Object.entries(attributes)) this.element.setAttribute(name, value);
    this.ready = new Promise((done, failed) => {
      this.element.addEventListener("load", done, { once: true });
      this.element.addEventListener("error", failed, { once: true });
    });
    this.element.addEventListener("camera-change", (event) => {
      if (event.detail.source !== "user-interaction") return;
      const { theta, phi, radius } = this.element.getCameraOrbit();
      const degrees = 180 / Math.PI;
      changed({ azimuth: theta * degrees - 90, elevation: 90 - phi * degrees, distance: radius, fov: this.element.getFieldOfView() });
    });
    pane.append(this.element);
  }

  look({ azimuth, elevation, distance, fov }) {
    this.element.cameraOrbit = `${azimuth + 90}deg ${90 - elevation}deg ${distance}m`;
    this.element.fieldOfView = `${fov}deg`;
    this.element.jumpCameraToGoal();
  }

  remove() {
    this.element.remove();
    URL.revokeObjectURL(this.address);
  }
}

class SplatView {
  constructor(gsplat, pane, bytes, label, changed) {
    const canvas = (this.canvas = document.createElement("canvas"));
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${label}. Arrow keys turn it, plus and minus zoom.`);
    pane.append(canvas);
    this.gsplat = gsplat;
    this.camera = new gsplat.Camera();
    this.camera.data.near = 0.7; // gsplat leaves out what is nearer than half of it: the pyramid that one looks out of
    this.scene = new gsplat.Scene();
    this.scene.addObject(new gsplat.Splat(gsplat.SplatData.Deserialize(bytes)));
    this.renderer = new gsplat.WebGLRenderer(canvas, []);
    this.renderer.backgroundColor = new gsplat.Color32(255, 255, 255, 255);
    this.ready = Promise.resolve();
    this.changed = changed;
    this.listen();
    const draw = () => {
      this.renderer.resize();
      this.camera.data.fx = this.camera.data.fy = (0.5 * canvas.height) / Math.tan((this.orbit.fov * Math.PI) / 360);
      this.renderer.render(this.scene, this.camera);
      this.frame = requestAnimationFrame(draw);
    };
    this.look({ azimuth: 0, elevation: 0, distance: 5, fov: 50 });
    draw();
  }

  listen() {
    const turn = (azimuth, elevation, zoom = 1) => {
      const raised = Math.max(-89, Math.min(89, this.orbit.elevation + elevation));
      const distance = Math.max(0.5, Math.min(30, this.orbit.distance * zoom));
      this.look({ ...this.orbit, azimuth: this.orbit.azimuth + azimuth, elevation: raised, distance });
      this.changed(this.orbit);
    };
    const canvas = this.canvas;
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) turn(-event.movementX / 2, event.movementY / 2);
    });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      turn(0, 0, Math.exp(event.deltaY / 1000));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, 10], ArrowDown: [0, -10],
                     "+": [0, 0, 0.9], "-": [0, 0, 1 / 0.9] }[event.key];
      if (!step) return;
      event.preventDefault();
      turn(...step);
    });
  }

  look(orbit) {
    this.orbit = orbit;
    const [a, e] = [(orbit.azimuth * Math.PI) / 180, (orbit.elevation * Math.PI) / 180];
    const away = [Math.cos(e) * Math.cos(a), Math.cos(e) * Math.sin(a), Math.sin(e)];
    const right = [-Math.sin(a), Math.cos(a), 0];
    const down = [Math.sin(e) * Math.cos(a), Math.sin(e) * Math.sin(a), -Math.cos(e)];
    // camera to world, its columns the camera's axes: right, down, forward
    const rows = [0, 1, 2].flatMap((i) => [right[i], down[i], -away[i]]);
    this.camera.position = new this.gsplat.Vector3(...away.map((x) => x * orbit.distance));
    this.camera.rotation = this.gsplat.Quaternion.FromMatrix3(new this.gsplat.Matrix3(...rows));
  }

  remove() {
    cancelAnimationFrame(this.frame);
    this.renderer.dispose();
    this.canvas.remove();
  }
}

const VIEWS = { glb: MeshView, splat: SplatView };

// Show objects in `holder`; scenes: [{id, kind, label}], cameras: where the views were seen from. Returns a function
// that removes them.
async function show(holder, scenes, cameras) {
  const panes = holder.querySelector(".panes");
  const buttons = holder.querySelector(".cameras");
  const message = holder.querySelector("[role=status]");
  panes.replaceChildren();
  buttons.replaceChildren();
  message.textContent = "Loading the object.";
  const views = [];
  const look = (orbit, except) => views.forEach((view) => view !== except && view.look(orbit));
  for (const { id, kind, label } of scenes) {
    const pane = document.createElement("figure");
    pane.className = "pane";
    const caption = document.createElement("figcaption");
    caption.textContent = label;
    pane.append(caption);
    panes.append(pane);
    const problem = document.getElementById(id).dataset.problem;
    if (problem) {
      pane.append(Object.assign(document.createElement("p"), { textContent: problem }));
      continue;
    }
    try {
      const view = new VIEWS[kind](await library(kind), pane, await unpack(id), `The object ${label}`, (orbit) => look(orbit, view));
      views.push(view);
      await view.ready;
    } catch (error) {
      pane.append(Object.assign(document.createElement("p"), { textContent: `This browser cannot show the object: ${error.message ?? "no WebGL"}` }));
    }
  }
  const far = { azimuth: cameras[0].azimuth + 25, elevation: 30, distance: 2.1 * cameras[0].distance, fov: 42 };
  const places = [["From afar", far], ...cameras.map((camera, i) => [`Camera ${i + 1}`, camera])];
  for (const [name, orbit] of places) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.addEventListener("click", () => look(orbit));
    buttons.append(button);
  }
  look(far);
  message.textContent = views.length ? "Drag or use the arrow keys to turn, scroll or pinch to zoom. Both turn together." : "";
  if (views.length < 2) message.textContent = message.textContent.replace(" Both turn together.", "");
  return () => views.forEach((view) => view.remove());
}
