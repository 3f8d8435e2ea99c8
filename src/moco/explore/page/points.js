// Draws the points of the map: by WebGL in one call, or on a plain canvas where there is none. A scene has
//   xy       x and y of each point in turn, in units of the map
//   colours  red, green, blue and opacity of each point in turn; after a change, call `colours()`
//   order    all points, as they come forward: the first of them lie evenly over the map
//            (`paint` takes how many of them are drawn)
//   view     the point of the map in the middle (x, y), CSS pixels per unit (scale), size in CSS pixels (width, height),
//            and screen pixels to a CSS pixel (ratio)
"use strict";
const Points = {
  webgl(canvas, { xy, colours, order, view }) {
    const gl = canvas.getContext("webgl", { antialias: false });
    if (!gl) return null;
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, `
      attribute vec2 place; attribute vec4 colour;
      uniform vec2 middle, zoom; uniform mediump float size; varying vec4 shade;
      void main() {
        gl_Position = vec4((place - middle) * zoom, 0., 1.); gl_PointSize = size; shade = colour;
      }`], [gl.FRAGMENT_SHADER, `
      precision mediump float; uniform mediump float size; varying vec4 shade;
      void main() {
        float inside = clamp((.5 - length(gl_PointCoord - .5)) * size, 0., 1.) * shade.a;
        gl_FragColor = vec4(shade.rgb * inside, inside);
      }`]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return null;
    gl.useProgram(program);
    const attribute = (name, length, type, bytes) => {
      const buffer = gl.createBuffer(), place = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      if (bytes) gl.bufferData(gl.ARRAY_BUFFER, bytes, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, length, type, type === gl.UNSIGNED_BYTE, 0, 0);
    };
    const places = new Float32Array(xy.length), shades = new Uint32Array(order.length);
    const packed = new Uint32Array(colours.buffer);
    order.forEach((row, i) => { places[2 * i] = xy[2 * row]; places[2 * i + 1] = xy[2 * row + 1]; });
    attribute("place", 2, gl.FLOAT, places);
    attribute("colour", 4, gl.UNSIGNED_BYTE, null); // stays bound: `colours` fills it
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    const uniform = (name) => gl.getUniformLocation(program, name);
    const [middle, zoomed, size] = ["middle", "zoom", "size"].map(uniform);
    return {
      kind: "webgl",
      colours: () => {
        order.forEach((row, i) => { shades[i] = packed[row]; });
        gl.bufferData(gl.ARRAY_BUFFER, shades, gl.DYNAMIC_DRAW);
      },
      paint: (diameter, most) => {
        gl.viewport(0, 0, canvas.width, canvas.height);
        gl.uniform2f(middle, view.x, view.y);
        gl.uniform2f(zoomed, 2 * view.scale / view.width, -2 * view.scale / view.height);
        gl.uniform1f(size, diameter * view.ratio);
        gl.clear(gl.COLOR_BUFFER_BIT);
        gl.drawArrays(gl.POINTS, 0, most);
      },
    };
  },
  plain(canvas, { xy, colours, order, view }) {
    const context = canvas.getContext("2d"), packed = new Uint32Array(colours.buffer);
    let sorted = order.slice(); // by colour, so that each is set once
    return {
      kind: "canvas",
      colours: () => { sorted = order.slice().sort((a, b) => packed[a] - packed[b]); },
      paint: (diameter, most) => {
        const { width, height, ratio, scale } = view, N = order.length, step = Math.ceil(N / most);
        const left = width / 2 - view.x * scale, top = height / 2 - view.y * scale;
        context.setTransform(ratio, 0, 0, ratio, 0, 0);
        context.clearRect(0, 0, width, height);
        for (let i = 0; i < N;) {
          const shade = packed[sorted[i]], at = 4 * sorted[i];
          context.fillStyle = `rgba(${colours[at]},${colours[at + 1]},${colours[at + 2]},${colours[at + 3] / 255})`;
          context.beginPath();
          for (; i < N && packed[sorted[i]] === shade; i++) {
            if (i % step) continue;
            const x = xy[2 * sorted[i]] * scale + left, y = xy[2 * sorted[i] + 1] * scale + top;
            if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
            if (N > 20000) context.rect(x - diameter / 2, y - diameter / 2, diameter, diameter);
            else { context.moveTo(x + diameter / 2, y); context.arc(x, y, diameter / 2, 0, 7); }
          }
          context.fill();
        }
      },
    };
  },
};
